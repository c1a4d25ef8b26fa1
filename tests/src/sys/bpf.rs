//! What the kernel says about its BPF programs: which are attached to a cgroup, what each costs.

use std::fs::File;
use std::io;
use std::net::SocketAddrV4;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use aya_obj::generated::{
    bpf_attach_type, bpf_attr, bpf_cmd, bpf_prog_info, bpf_prog_type, bpf_stats_type,
};

/// A program, wherever it is attached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attached {
    /// Its id.
    pub id: u32,
    /// Its name, cut by the kernel to 15 bytes.
    pub name: String,
    /// Nanoseconds spent in it while a [`StatsGuard`] existed, the measurement itself included.
    pub run_time_ns: u64,
    /// How often it ran while a [`StatsGuard`] existed.
    pub run_count: u64,
    /// How often it did not run because it was running on that CPU already: the kernel lets no
    /// tracing program interrupt itself, or run while another task is preempted in it.
    pub misses: u64,
}

/// The hooks that this project uses or may come to use.
const HOOKS: [bpf_attach_type; 11] = [
    bpf_attach_type::BPF_CGROUP_INET4_CONNECT,
    bpf_attach_type::BPF_CGROUP_INET6_CONNECT,
    bpf_attach_type::BPF_CGROUP_INET4_GETPEERNAME,
    bpf_attach_type::BPF_CGROUP_INET6_GETPEERNAME,
    bpf_attach_type::BPF_CGROUP_UDP4_SENDMSG,
    bpf_attach_type::BPF_CGROUP_UDP6_SENDMSG,
    bpf_attach_type::BPF_CGROUP_UDP4_RECVMSG,
    bpf_attach_type::BPF_CGROUP_UDP6_RECVMSG,
    bpf_attach_type::BPF_CGROUP_SOCK_OPS,
    bpf_attach_type::BPF_CGROUP_INET_SOCK_CREATE,
    bpf_attach_type::BPF_CGROUP_INET_SOCK_RELEASE,
];

/// The programs attached to this cgroup itself (not to those above it).
///
/// # Errors
///
/// Those of bpf(2), and of opening the directory.
pub fn attached(cgroup: &Path) -> io::Result<Vec<Attached>> {
    let directory = File::open(cgroup)?;
    let mut found = Vec::new();
    for hook in HOOKS {
        for id in query(&directory, hook)? {
            match program(id) {
                Ok(program) => found.push(program),
                // Detached since the query.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(found)
}

fn query(cgroup: &File, hook: bpf_attach_type) -> io::Result<Vec<u32>> {
    let mut ids = [0u32; 64];
    let mut attr = empty();
    // SAFETY: an all-zero union is valid for each of its members.
    let query = unsafe { &mut attr.query };
    query.__bindgen_anon_1.target_fd = cgroup.as_raw_fd().cast_unsigned();
    query.attach_type = hook as u32;
    query.prog_ids = ids.as_mut_ptr() as u64;
    query.__bindgen_anon_2.prog_cnt = u32::try_from(ids.len()).unwrap_or_default();
    bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr)?;
    // SAFETY: the kernel has written the count into the member that was set above.
    let answer = unsafe { attr.query.__bindgen_anon_2 };
    // SAFETY: as above.
    let count = unsafe { answer.prog_cnt };
    Ok(ids.into_iter().take(count as usize).collect())
}

/// All programs that the machine has loaded.
///
/// # Errors
///
/// Those of bpf(2).
pub fn loaded() -> io::Result<Vec<Attached>> {
    let mut found = Vec::new();
    let mut id = 0;
    loop {
        let mut attr = empty();
        attr.__bindgen_anon_6.__bindgen_anon_1.start_id = id;
        match bpf(bpf_cmd::BPF_PROG_GET_NEXT_ID, &mut attr) {
            Ok(_) => {}
            // That was the last one.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(found),
            Err(error) => return Err(error),
        }
        // SAFETY: the kernel has written the next id into the member beside the one set above.
        let next = unsafe { attr.__bindgen_anon_6.next_id };
        match program(next) {
            Ok(program) => found.push(program),
            // Unloaded since.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
        id = next;
    }
}

/// The program with this id.
///
/// # Errors
///
/// Those of bpf(2): `ENOENT` when there is none.
pub fn program(id: u32) -> io::Result<Attached> {
    let mut attr = empty();
    attr.__bindgen_anon_6.__bindgen_anon_1.prog_id = id;
    let fd = bpf(bpf_cmd::BPF_PROG_GET_FD_BY_ID, &mut attr)?;
    // SAFETY: a new descriptor that the kernel has just handed out, owned by nobody else.
    let program = unsafe { OwnedFd::from_raw_fd(fd) };

    // SAFETY: plain integers, for all of which zero is a value.
    let mut info: bpf_prog_info = unsafe { std::mem::zeroed() };
    let mut attr = empty();
    attr.info.bpf_fd = program.as_raw_fd().cast_unsigned();
    attr.info.info_len = u32::try_from(size_of::<bpf_prog_info>()).unwrap_or_default();
    attr.info.info = &raw mut info as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    let name =
        info.name.iter().take_while(|&&c| c != 0).map(|&c| char::from(c.cast_unsigned())).collect();
    Ok(Attached {
        id,
        name,
        run_time_ns: info.run_time_ns,
        run_count: info.run_cnt,
        misses: info.recursion_misses,
    })
}

/// A program of somebody else at the hook of `connect()` of IPv4 sockets.
#[derive(Debug)]
pub struct Stranger(OwnedFd);

impl Stranger {
    /// One that leaves everything as it is, or sends every connect there.
    ///
    /// # Errors
    ///
    /// Those of bpf(2).
    pub fn load(to: Option<SocketAddrV4>) -> io::Result<Self> {
        const MOVE: u64 = 0xb7;
        const STORE: u64 = 0x63;
        const EXIT: u64 = 0x95;
        // Fields of `struct bpf_sock_addr`.
        const IP: u64 = 4;
        const PORT: u64 = 24;
        let value = |register: u64, value: u32| MOVE | register << 8 | u64::from(value) << 32;
        // Register 1 points to the structure.
        let store = |register: u64, field: u64| STORE | (1 | register << 4) << 8 | field << 16;
        let mut instructions = Vec::new();
        if let Some(to) = to {
            let ip = u32::from_ne_bytes(to.ip().octets());
            instructions.extend([value(2, ip), store(2, IP)]);
            instructions.extend([value(2, to.port().to_be().into()), store(2, PORT)]);
        }
        instructions.extend([value(0, 1), EXIT]);
        let mut attr = empty();
        // SAFETY: an all-zero union is valid for each of its members.
        let load = unsafe { &mut attr.__bindgen_anon_3 };
        load.prog_type = bpf_prog_type::BPF_PROG_TYPE_CGROUP_SOCK_ADDR as u32;
        load.expected_attach_type = bpf_attach_type::BPF_CGROUP_INET4_CONNECT as u32;
        load.insns = instructions.as_ptr() as u64;
        load.insn_cnt = u32::try_from(instructions.len()).map_err(io::Error::other)?;
        load.license = c"GPL".as_ptr() as u64;
        let name = b"stranger".map(u8::cast_signed);
        load.prog_name[..name.len()].copy_from_slice(&name);
        let fd = bpf(bpf_cmd::BPF_PROG_LOAD, &mut attr)?;
        // SAFETY: a new descriptor that the kernel has just handed out, owned by nobody else.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Attaches it to a cgroup, beside those that are there, until the link is closed.
    ///
    /// # Errors
    ///
    /// Those of bpf(2), and of opening the directory.
    pub fn attach(&self, cgroup: &Path) -> io::Result<OwnedFd> {
        let cgroup = File::open(cgroup)?;
        let mut attr = empty();
        attr.link_create.__bindgen_anon_1.prog_fd = self.0.as_raw_fd().cast_unsigned();
        attr.link_create.__bindgen_anon_2.target_fd = cgroup.as_raw_fd().cast_unsigned();
        attr.link_create.attach_type = bpf_attach_type::BPF_CGROUP_INET4_CONNECT as u32;
        let fd = bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr)?;
        // SAFETY: a new descriptor that the kernel has just handed out, owned by nobody else.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Puts it in place of the program of a link.
    ///
    /// # Errors
    ///
    /// Those of bpf(2).
    pub fn replace(&self, link: BorrowedFd<'_>) -> io::Result<()> {
        let mut attr = empty();
        attr.link_update.link_fd = link.as_raw_fd().cast_unsigned();
        attr.link_update.__bindgen_anon_1.new_prog_fd = self.0.as_raw_fd().cast_unsigned();
        bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
    }
}

/// While it exists, the kernel measures every BPF program of the machine. Bound to a descriptor,
/// so that nothing stays switched on after a crash.
#[derive(Debug)]
pub struct StatsGuard(#[expect(dead_code, reason = "held for its closing")] OwnedFd);

impl StatsGuard {
    /// Switches the measurement on.
    ///
    /// # Errors
    ///
    /// Those of bpf(2).
    pub fn enable() -> io::Result<Self> {
        let mut attr = empty();
        attr.enable_stats.type_ = bpf_stats_type::BPF_STATS_RUN_TIME as u32;
        let fd = bpf(bpf_cmd::BPF_ENABLE_STATS, &mut attr)?;
        // SAFETY: a new descriptor that the kernel has just handed out, owned by nobody else.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }
}

fn empty() -> bpf_attr {
    // SAFETY: a union of plain integers; the kernel demands zero in what is not used.
    unsafe { std::mem::zeroed() }
}

fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<libc::c_int> {
    let size = size_of::<bpf_attr>();
    // SAFETY: `attr` is a whole `bpf_attr`; the pointers that callers put into it refer to buffers
    // of the lengths they put beside them, which outlive this call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command as libc::c_long, attr, size) };
    super::checked(libc::c_int::try_from(result).unwrap_or(-1))
}
