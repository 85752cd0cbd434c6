//! Square f32 products by lavender-wgpu and by burn, on the same adapter and one after the other, and the ratio.
//!
//! `cargo run --release --manifest-path benches/peers/burn/Cargo.toml -- [--program PATH] [SIZE…]`
//!
//! burn picks its adapter itself; where a machine has several, read the names that both print. Its first call of a shape
//! tunes and compiles and is told apart.

use std::process::Command;
use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut program = "target/release/lavender-wgpu".to_string();
    let mut sizes: Vec<usize> = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--program" => program = arguments.next().ok_or("--program: expected a path")?,
            size => sizes.push(size.parse().map_err(|_| format!("{size}: expected a size"))?),
        }
    }
    if sizes.is_empty() {
        sizes = vec![256, 512, 1024, 2048];
    }
    let folder = std::env::temp_dir().join(format!("burn-peer-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let report = folder.join("report.json");
    let mut ours = Command::new(&program);
    ours.args(["bench", "kernels", "--json"]).arg(&report);
    for n in &sizes {
        ours.args(["--filter", &format!("matmul {n}×{n}×{n} a f32 b f32")]);
    }
    if !ours.status()?.success() {
        return Err(format!("{program} failed").into());
    }
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&report)?)?;
    std::fs::remove_dir_all(&folder)?;

    let device = Device::wgpu(Default::default());
    println!("\nburn {} on {device:?}; ours on {}", "0.22.1", report["tier"]["name"]);
    println!("{:28} {:>10} {:>12} {:>10} {:>8}", "", "ours, ms", "burn first", "burn, ms", "ratio");
    for n in sizes {
        let name = format!("matmul {n}×{n}×{n} a f32 b f32");
        let kernels = report["kernels"].as_array().ok_or("a report without kernels")?;
        let kernel = kernels.iter().find(|k| k["name"].as_str().is_some_and(|s| s.contains(&name)));
        let mine = kernel.and_then(|k| k["median_ms"].as_f64()).ok_or("a size that was not measured")?;
        let random = || Tensor::<2>::random([n, n], Distribution::Default, &device);
        let (a, b) = (random(), random());
        // Reading one number back waits for the product.
        let once = || {
            let start = Instant::now();
            let c = a.clone().matmul(b.clone());
            c.slice([0..1, 0..1]).into_scalar::<f32>();
            start.elapsed().as_secs_f64() * 1e3
        };
        let first = once();
        let (begin, mut times) = (Instant::now(), Vec::new());
        while begin.elapsed().as_secs_f64() < 1.0 || times.len() < 5 {
            times.push(once());
        }
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        println!("{name:28} {mine:10.2} {first:12.1} {median:10.2} {:7.2}×", median / mine);
    }
    Ok(())
}
