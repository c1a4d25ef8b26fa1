//! Writing an initial ram disk: the "newc" form of cpio, as the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst` describes it.

use anyhow::{Context, Result};

/// An archive in the making.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

/// The file type bits of a mode, see inode(7).
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;

impl Archive {
    /// Adds a directory; the directory that holds it comes first.
    pub(crate) fn directory(&mut self, path: &str) -> Result<()> {
        self.entry(path, DIRECTORY | 0o755, &[])
    }

    /// Adds a file that can be executed.
    pub(crate) fn executable(&mut self, path: &str, content: &[u8]) -> Result<()> {
        self.entry(path, REGULAR | 0o755, content)
    }

    /// The archive's bytes.
    pub(crate) fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let size = u32::try_from(content.len())
            .ok()
            .with_context(|| format!("{path} does not fit: 4 GiB is the format's limit"))?;
        let name_size = u32::try_from(path.len() + 1)?;
        self.entries += 1;
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor,
        // namesize, check
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    /// Header with name, and content, each end at a multiple of four.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an archive the way the kernel does (`init/initramfs.c`).
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |index: usize| {
                let text = std::str::from_utf8(&bytes[6 + index * 8..][..8]).expect("hex");
                u32::from_str_radix(text, 16).expect("hex")
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = std::str::from_utf8(&bytes[110..110 + name_size - 1]).expect("a name");
            if name == "TRAILER!!!" {
                return entries;
            }
            let start = (110 + name_size).next_multiple_of(4);
            entries.push((name.to_owned(), mode, bytes[start..start + size].to_vec()));
            bytes = &bytes[(start + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn archives_are_read_back() {
        let mut archive = Archive::default();
        archive.directory("bin").expect("a directory");
        archive.executable("bin/a", b"12345").expect("a file");
        archive.executable("init", b"").expect("a file");
        let entries = read(&archive.finish().expect("an archive"));
        assert_eq!(
            entries,
            [
                ("bin".into(), 0o040_755, vec![]),
                ("bin/a".into(), 0o100_755, b"12345".to_vec()),
                ("init".into(), 0o100_755, vec![]),
            ]
        );
    }
}
