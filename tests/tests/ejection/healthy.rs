//! Healthy backends, and clients that abort their connects in all ways there are: nothing is held
//! against any backend.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use mesh_tests::mortal::aborts::Tally;
use mesh_tests::mortal::server::Manner;
use mesh_tests::mortal::{Backend, Pace};
use mesh_tests::{Service, Withheld, process};

use crate::lan::Lan;
use crate::scene::{Scene, Standing, VIP, app, wait};

/// How many connects, when it is not the usual number: the full proof is
/// `MESH_EJECTION_CONNECTS=200000 cargo xtask test healthy`.
const VARIABLE: &str = "MESH_EJECTION_CONNECTS";
const CONNECTS: u64 = 20_000;
const MACHINES: u8 = 3;

#[test]
fn healthy_backends_stay_whatever_clients_do() -> Result<()> {
    let connects = match std::env::var(VARIABLE) {
        Ok(text) => text.parse().with_context(|| format!("{VARIABLE}={text}"))?,
        Err(_) => CONNECTS,
    };
    let withheld = Withheld::watch()?;
    let (scene, _lan, _six) = scene()?;
    let mut command = scene.client()?;
    command.args(["aborts", VIP, "[fd00:96::10]:80", "10.96.0.11:80", "10.9.0.254"]);
    command.args(["--seed", "7", "--connects", &connects.to_string()]);
    let mut mix = command.stdout(Stdio::piped()).spawn()?;
    let mut killed = 0;
    while mix.try_wait()?.is_none() {
        // Processes that are killed with what they have open.
        let pace = Pace { threads: 8, pause: 0, hold: 50, ..Pace::BRISK };
        let storm = scene.storm_in(&scene.node.namespace(), "killed", pace)?;
        wait(30 + killed % 7 * 5);
        storm.kill()?;
        killed += 1;
        ensure!(killed < 20_000, "the clients do not end");
        ensure_untouched(&scene.standings()?)?;
    }
    let output = mix.wait_with_output()?;
    ensure!(output.status.success(), "the clients failed: {output:?}");
    let tally: Tally = serde_json::from_slice(&output.stdout)?;
    println!("{killed} processes killed; {tally:#?}");
    let failed: Vec<_> = tally.keys().filter(|end| end.contains("failed")).collect();
    ensure!(failed.is_empty(), "{failed:?}");
    ensure!(tally.values().sum::<u64>() >= connects && killed > 3, "{tally:?}");
    ensure!(tally.len() == 14, "not every kind occurred: {tally:?}");

    let shown = scene.standings()?;
    ensure_untouched(&shown)?;
    let opened: u64 = shown.iter().map(|shown| shown.opened).sum();
    ensure!(opened > connects, "{opened} of {connects} were balanced");
    let nowhere: Vec<Standing> = scene.node.agent.json(&["backends", "nowhere"])?;
    ensure_untouched(&nowhere)?;
    ensure!(nowhere[0].opened > 0, "{nowhere:?}");
    ensure!(scene.counter("all_ejected")? == 0 && scene.counter("share_reached")? == 0);
    let open = || {
        let shown = scene.standings()?;
        Ok::<_, anyhow::Error>(shown.iter().map(|shown| shown.active).sum::<u64>())
    };
    let ended = process::until("the last connections to end", process::LIMIT, || {
        Ok((open()? == 0).then_some(()))
    });
    if let Err(error) = ended {
        let (open, withheld) = (open()?, withheld.allowance(connects)?);
        let shown = scene.standings();
        ensure!(open <= withheld, "{error:#}, {withheld} events were withheld: {shown:?}");
        println!("{open} ends were not seen; {withheld} events were withheld");
    }
    scene.control()
}

fn ensure_untouched(shown: &[Standing]) -> Result<()> {
    for shown in shown {
        ensure!(shown.failed == 0 && !shown.is_out(), "{shown:?}");
    }
    Ok(())
}

/// Three machines, of both families, and a service that no route leads to.
fn scene() -> Result<(Scene, Lan, Vec<Backend>)> {
    let quick = "{failures: 1, base: 1s}";
    let service = (1..=MACHINES).fold(app(quick).address("fd00:96::10"), |app, n| {
        app.endpoint(&format!("10.9.0.{n}")).endpoint(&format!("fd00:9::{n}"))
    });
    let mut scene = Scene::bare(service.clone())?;
    let nowhere = Service::new("nowhere").address("10.96.0.11").port(80, 8080);
    let nowhere = nowhere.ejection(quick).endpoint("192.0.2.1");
    scene.node.agent.write_services("test.yaml", &Service::file(&[service, nowhere]))?;
    let lan = Lan::new(&scene.node, MACHINES)?;
    let mut six = Vec::new();
    for n in 1..=MACHINES {
        let place = SocketAddr::from((Ipv4Addr::new(10, 9, 0, n), 8080));
        scene.start(&lan.machine(n)?, &format!("four-{n}"), place, Manner::Plain)?;
        let place: SocketAddr = format!("[fd00:9::{n}]:8080").parse()?;
        let command = lan.machine(n)?.outside(process::binary("mesh-mortal")?);
        six.push(Backend::start(command, &format!("six-{n}"), place, Manner::Plain)?);
    }
    // With data in the SYN, and without asking the server for a cookie first.
    scene.node.sysctl("net/ipv4/tcp_fastopen", "5")?;
    scene.node.agent.start()?;
    Ok((scene, lan, six))
}
