//! Rebuilds the crate when an embedded file changes.
fn main() {
    println!("cargo::rerun-if-changed=wgsl");
    println!("cargo::rerun-if-changed=models/mini");
    println!("cargo::rerun-if-changed=build.rs");
}
