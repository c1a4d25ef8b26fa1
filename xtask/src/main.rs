//! Tasks a person runs from a checkout.
fn main() {}
