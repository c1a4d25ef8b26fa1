//! What happens when something fails: every row of `cargo xtask matrix`, in its short form.

use anyhow::{Result, ensure};
use mesh_tests::matrix::course::Course;
use mesh_tests::matrix::figure::Figure;
use mesh_tests::matrix::rows::ROWS;
use mesh_tests::matrix::{self, Size, Told, table};

#[test]
fn every_bound_holds() -> Result<()> {
    let reports = matrix::run(ROWS, Size::SHORT, &|told| {
        if let Told::Ends(report) = told {
            println!("{} after {:.0} s", report.name, report.seconds);
        }
    });
    let table = table::of(&reports);
    println!("{table}");
    ensure!(reports.len() == ROWS.len(), "{} rows of {}", reports.len(), ROWS.len());
    ensure!(reports.iter().all(matrix::Report::holds), "{table}");
    Ok(())
}

/// The control: where nothing finds out that an endpoint has failed, the bounds do not hold.
#[test]
fn bounds_can_break() -> Result<()> {
    let figures = Course { ejection: "ejection: off", ..Course::PASSIVE }.run()?;
    let broken: Vec<&Figure> = figures.iter().filter(|figure| !figure.holds()).collect();
    println!("{broken:#?}");
    ensure!(broken.len() >= 3, "{figures:#?}");
    Ok(())
}
