//! Healthy backends, and clients that abort their connects in all ways there are: nothing is held
//! against any backend.

use anyhow::{Context, Result, ensure};
use mesh_tests::mortal::mixture::{Done, Mixture};
use mesh_tests::{Withheld, process};

use crate::scene::Standing;

/// How many connects, when it is not the usual number: the full proof is
/// `MESH_EJECTION_CONNECTS=200000 cargo xtask test healthy`.
const VARIABLE: &str = "MESH_EJECTION_CONNECTS";
const CONNECTS: u64 = 20_000;

#[test]
fn healthy_backends_stay_whatever_clients_do() -> Result<()> {
    let connects = match std::env::var(VARIABLE) {
        Ok(text) => text.parse().with_context(|| format!("{VARIABLE}={text}"))?,
        Err(_) => CONNECTS,
    };
    let withheld = Withheld::watch()?;
    let mixture = Mixture::start(&[])?;
    let scene = &mixture.scene;
    let Done { tally, killed } = mixture.run(connects, || ensure_untouched(&scene.standings()?))?;
    println!("{killed} processes killed; {tally:#?}");

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
    mixture.scene.control()
}

fn ensure_untouched(shown: &[Standing]) -> Result<()> {
    for shown in shown {
        ensure!(shown.failed == 0 && !shown.is_out(), "{shown:?}");
    }
    Ok(())
}
