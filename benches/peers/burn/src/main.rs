//! Square f32 products by lavender-wgpu and by burn, on the same adapter and in turns, and the ratio.
//!
//! `cargo run --release --manifest-path benches/peers/burn/Cargo.toml -- [--program PATH] [SIZE…]`
//!
//! burn picks its adapter itself; where a machine has several, read the names that both print. Its first call of a shape
//! tunes and compiles and is told apart.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};

/// How often both are measured: the machine may be faster in one second than in the next.
const ROUNDS: usize = 9;

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
    let device = Device::wgpu(Default::default());
    println!("burn 0.22.1 on {device:?}; medians of {ROUNDS} rounds, in each first ours and then burn");
    println!(
        "{:28} {:>10} {:>12} {:>10} {:>8} {:>12}   rounds",
        "", "ours, ms", "burn first", "burn, ms", "ratio", "by CPU time"
    );
    for n in sizes {
        let name = format!("matmul {n}×{n}×{n} a f32 b f32");
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
        let (mut ours, mut burns, mut ratios, mut by_cpu) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let (mine, my_cpu) = our_millis(&program, &name, &folder.join("report.json"))?;
            let (begin, cpu, mut times) = (Instant::now(), cpu_millis(), Vec::new());
            while begin.elapsed().as_secs_f64() < 0.5 || times.len() < 3 {
                times.push(once());
            }
            let its_cpu = cpu.zip(cpu_millis()).map(|(before, after)| (after - before) / times.len() as f64);
            let its = median(&mut times);
            ours.push(mine);
            burns.push(its);
            ratios.push(its / mine);
            by_cpu.extend(its_cpu.zip(my_cpu).map(|(its, mine)| its / mine));
        }
        let rounds: Vec<String> = ratios.iter().map(|ratio| format!("{ratio:.2}")).collect();
        let [mine, its, ratio] = [&mut ours[..], &mut burns[..], &mut ratios[..]].map(median);
        let by_cpu = if by_cpu.is_empty() { "–".to_string() } else { format!("{:.2}×", median(&mut by_cpu)) };
        println!("{name:28} {mine:10.2} {first:12.1} {its:10.2} {ratio:7.2}× {by_cpu:>12}   {}", rounds.join(" "));
    }
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}

/// Milliseconds of the kernel of this name, by `program bench`, by the clock and of CPU time.
fn our_millis(program: &str, name: &str, report: &Path) -> Result<(f64, Option<f64>), Box<dyn std::error::Error>> {
    let mut bench = Command::new(program);
    bench.args(["bench", "kernels", "--seconds", "0.5", "--filter", name, "--json"]).arg(report);
    let run = bench.stdout(Stdio::null()).stderr(Stdio::inherit()).status()?;
    if !run.success() {
        return Err(format!("{program} failed").into());
    }
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(report)?)?;
    let kernels = report["kernels"].as_array().ok_or("a report without kernels")?;
    let kernel = kernels.iter().find(|k| k["name"].as_str().is_some_and(|s| s.contains(name)));
    let kernel = kernel.ok_or(format!("{name} was not measured"))?;
    Ok((kernel["median_ms"].as_f64().ok_or("a kernel without a time")?, kernel["cpu_ms"].as_f64()))
}

/// Milliseconds of CPU that all threads of this process have used, where the system tells: on a software driver they are the
/// kernel's own.
fn cpu_millis() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: f64 = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
    Some(ticks * 10.0)
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
