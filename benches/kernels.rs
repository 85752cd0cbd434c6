//! Times matmul and conv2d on the adapter at hand: `cargo bench --bench kernels [-- FILTER]`.
//!
//! With `LAVENDER_PYTHON` set to a Python that has PyTorch, each line ends with the ratio to PyTorch
//! on this machine's CPU (all cores, or `LAVENDER_THREADS`), else with the share of what the adapter
//! reaches on multiply-adds alone. On Linux a software driver's line also tells GFLOP per second of
//! CPU time times cores, which a busy machine distorts less.

use std::process::Command;
use std::time::Instant;

use lavender_wgpu::gpu::{Gpu, GpuOptions};
use lavender_wgpu::ops::conv2d::{Conv2dOptions, conv2d, conv2d_grad_input, conv2d_grad_weight};
use lavender_wgpu::ops::fma_probe::fma_probe;
use lavender_wgpu::ops::matmul::{MatmulOptions, matmul, matmul_quantized};
use lavender_wgpu::tensor::{DType, Quantization, QuantizedMatrix, Tensor};

/// Seconds a case is repeated for, after a first run that compiles.
const SECONDS: f64 = 1.0;

/// Uploads a case's operands and returns what is timed.
type Setup = Box<dyn Fn(&Gpu) -> Timed>;
/// Records one run of a case.
type Timed = Box<dyn Fn()>;

struct Case {
    name: String,
    flops: f64,
    /// Bytes of the operands and the result, each counted once.
    bytes: f64,
    run: Setup,
    /// PyTorch statements: set-up, and the one that is timed.
    torch: [String; 2],
}

fn tensor(gpu: &Gpu, dtype: DType, shape: &[usize]) -> Tensor {
    let n: usize = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect();
    Tensor::from_bytes(gpu, &dtype.narrow(&values), dtype, shape)
}

fn product(m: usize, n: usize, k: usize, dtype: DType, trans: [bool; 2]) -> Case {
    let [trans_a, trans_b] = trans;
    let mark = |t: bool| if t { "ᵀ" } else { "" };
    Case {
        name: format!(
            "matmul {m}x{n}x{k} a{} b{} {dtype:?}",
            mark(trans_a),
            mark(trans_b)
        ),
        flops: 2.0 * (m * n * k) as f64,
        bytes: (4 * m * (k + n) + dtype.bytes() * n * k) as f64,
        run: Box::new(move |gpu| {
            let a = tensor(gpu, DType::F32, &if trans_a { [k, m] } else { [m, k] });
            let b = tensor(gpu, dtype, &if trans_b { [n, k] } else { [k, n] });
            Box::new(move || {
                let options = MatmulOptions {
                    trans_a,
                    trans_b,
                    ..MatmulOptions::default()
                };
                matmul(&a, &b, &options);
            })
        }),
        torch: [
            format!(
                "a=torch.rand({}); b=torch.rand({})",
                if trans_a {
                    format!("{k},{m}")
                } else {
                    format!("{m},{k}")
                },
                if trans_b {
                    format!("{n},{k}")
                } else {
                    format!("{k},{n}")
                }
            ),
            format!(
                "a{}@b{}",
                if trans_a { ".T" } else { "" },
                if trans_b { ".T" } else { "" }
            ),
        ],
    }
}

/// A linear layer's product with its weight [outputs, inputs] quantised: x·wᵀ, or the gradient dy·w.
fn quantized(m: usize, outputs: usize, inputs: usize, kind: Quantization, trans_b: bool) -> Case {
    let (n, k) = match trans_b {
        true => (outputs, inputs),
        false => (inputs, outputs),
    };
    let dtype = DType::F32;
    Case {
        name: format!(
            "matmul {m}x{n}x{k} a b{} {kind:?}",
            if trans_b { "ᵀ" } else { "" }
        ),
        bytes: (4 * m * (k + n)) as f64 + kind.bytes(outputs, inputs) as f64,
        run: Box::new(move |gpu| {
            let a = tensor(gpu, dtype, &[m, k]);
            let values: Vec<f32> = (0..n * k).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect();
            let w = QuantizedMatrix::from_f32(gpu, &values, [outputs, inputs], kind);
            let w = w.expect("finite values");
            Box::new(move || {
                let options = MatmulOptions {
                    trans_b,
                    ..MatmulOptions::default()
                };
                matmul_quantized(&a, &w, &options);
            })
        }),
        // PyTorch by its float weight.
        ..product(m, n, k, dtype, [false, trans_b])
    }
}

fn convolution(mode: &'static str, side: usize, ci: usize, co: usize, stride: usize) -> Case {
    let out = side.div_ceil(stride);
    let pass = match mode {
        "forward" => format!("F.conv2d(x,w,None,{stride},1)"),
        "input" => format!("torch.nn.grad.conv2d_input(x.shape,w,dy,{stride},1)"),
        _ => format!("torch.nn.grad.conv2d_weight(x,w.shape,dy,{stride},1)"),
    };
    Case {
        name: format!("conv2d {mode} {side}x{side} {ci}→{co} 3x3 /{stride}"),
        flops: 2.0 * (out * out * ci * co * 9) as f64,
        bytes: 4.0 * (side * side * ci + 9 * ci * co + out * out * co) as f64,
        run: Box::new(move |gpu| {
            let x = tensor(gpu, DType::F32, &[1, side, side, ci]);
            let w = tensor(gpu, DType::F32, &[3, 3, ci, co]);
            let dy = tensor(gpu, DType::F32, &[1, out, out, co]);
            Box::new(move || {
                let options = Conv2dOptions::new(stride, 1);
                match mode {
                    "forward" => conv2d(&x, &w, None, &options),
                    "input" => conv2d_grad_input(&dy, &w, x.shape(), &options),
                    _ => conv2d_grad_weight(&x, &dy, 3, 3, &options),
                };
            })
        }),
        torch: [
            format!(
                "x=torch.rand(1,{ci},{side},{side}).to(memory_format=torch.channels_last); \
                 w=torch.rand({co},{ci},3,3).to(memory_format=torch.channels_last); \
                 dy=torch.rand(1,{co},{out},{out}).to(memory_format=torch.channels_last)"
            ),
            pass,
        ],
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for n in [256, 512, 1024, 2048, 505, 513, 519, 1017, 1025, 1031] {
        cases.push(product(n, n, n, DType::F32, [false; 2]));
    }
    for (m, n, k) in [
        (1, 4096, 1024),
        (8, 4096, 1024),
        (77, 768, 768),
        (300, 1536, 576),
    ] {
        cases.push(product(m, n, k, DType::F32, [false, true]));
    }
    cases.push(product(300, 1536, 576, DType::Bf16, [false, true]));
    cases.push(product(1, 4096, 1024, DType::Bf16, [false, true]));
    cases.push(product(300, 576, 1536, DType::F32, [false; 2]));
    cases.push(product(1536, 576, 300, DType::F32, [true, false]));
    cases.push(product(8, 576, 300, DType::F32, [true, false]));
    cases.push(product(4096, 320, 320, DType::F32, [false, true]));
    for (m, outputs, inputs) in [(1, 4096, 1024), (300, 1536, 576), (1100, 1536, 576)] {
        for trans_b in [true, false] {
            let (n, k) = match trans_b {
                true => (outputs, inputs),
                false => (inputs, outputs),
            };
            if m == 1 && !trans_b {
                continue;
            }
            for dtype in [DType::F32, DType::F16] {
                cases.push(product(m, n, k, dtype, [false, trans_b]));
            }
            for kind in [Quantization::Q8, Quantization::Q4] {
                cases.push(quantized(m, outputs, inputs, kind, trans_b));
            }
        }
    }
    for mode in ["forward", "input", "weight"] {
        for (side, ci, co, stride) in [
            (64, 320, 320, 1),
            (64, 4, 320, 1),
            (32, 64, 64, 1),
            (33, 31, 65, 1),
            (64, 64, 64, 2),
        ] {
            cases.push(convolution(mode, side, ci, co, stride));
        }
    }
    cases
}

/// PyTorch's seconds for every case, in order.
fn torch_seconds(cases: &[Case], threads: usize) -> Option<Vec<f64>> {
    let python = std::env::var_os("LAVENDER_PYTHON")?;
    let mut script = format!(
        "import torch,time\nimport torch.nn.functional as F\ntorch.set_num_threads({threads})\n\
         def t(f):\n f(); best=9e9; end=time.time()+{SECONDS}/2\n \
         while time.time()<end:\n  s=time.perf_counter(); f(); best=min(best,time.perf_counter()-s)\n \
         print(best)\n"
    );
    for case in cases {
        script += &format!("{}\nt(lambda: {})\n", case.torch[0], case.torch[1]);
    }
    let output = Command::new(python)
        .args(["-c", &script])
        .env_remove("LD_LIBRARY_PATH")
        .env("OMP_NUM_THREADS", threads.to_string())
        .output()
        .ok()?;
    if !output.status.success() {
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        return None;
    }
    let text = String::from_utf8(output.stdout).ok()?;
    text.lines().map(|l| l.parse().ok()).collect()
}

/// CPU seconds of this process so far, where the system tells.
fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    let ticks = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
    Some(ticks / 100.0)
}

/// Prints what our allocator holds for the linear weights of SmolVLM-256M's size: as f32, as f16 and quantised.
fn base_memory(gpu: &Gpu) {
    let text = [
        (576, 576),
        (192, 576),
        (192, 576),
        (576, 576),
        (1536, 576),
        (1536, 576),
        (576, 1536),
    ];
    let vision = [
        (768, 768),
        (768, 768),
        (768, 768),
        (768, 768),
        (3072, 768),
        (768, 3072),
    ];
    let layers = std::iter::repeat_n(&text[..], 30).chain(std::iter::repeat_n(&vision[..], 12));
    let shapes: Vec<(usize, usize)> = layers.flatten().copied().collect();
    let held = |hold: &dyn Fn(usize, usize) -> Box<dyn std::any::Any>| {
        let before = gpu.memory().current_bytes;
        let weights: Vec<_> = shapes.iter().map(|&(o, i)| hold(o, i)).collect();
        let bytes = gpu.memory().current_bytes - before;
        drop(weights);
        bytes as f64 / f64::from(1 << 20)
    };
    let float = |dtype| held(&|o, i| Box::new(Tensor::empty(gpu, dtype, &[o, i])));
    let quantized = |kind| {
        held(&|o, i| {
            let values = vec![0.5; o * i];
            Box::new(QuantizedMatrix::from_f32(gpu, &values, [o, i], kind))
        })
    };
    println!(
        "linear weights of SmolVLM-256M: f32 {:.1} MiB, f16 {:.1}, q8 {:.1}, q4 {:.1}",
        float(DType::F32),
        float(DType::F16),
        quantized(Quantization::Q8),
        quantized(Quantization::Q4)
    );
}

fn main() {
    let options = GpuOptions {
        adapter: std::env::var("LAVENDER_ADAPTER").ok(),
        ..GpuOptions::default()
    };
    let gpu = Gpu::new(&options).expect("an adapter");
    println!("{}", gpu.tier());
    let probe = fma_probe(&gpu).expect("the probe runs");
    println!("multiply-adds alone: {:.1} GFLOP/s", probe / 1e9);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = std::env::var("LAVENDER_THREADS")
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(cores);
    base_memory(&gpu);
    let filters: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let mut cases = cases();
    cases.retain(|c| filters.is_empty() || filters.iter().any(|f| c.name.contains(f)));
    let torch = torch_seconds(&cases, threads);
    for (i, case) in cases.iter().enumerate() {
        let run = (case.run)(&gpu);
        run();
        gpu.wait().expect("the case runs");
        let (begin, cpu, mut best, mut count) = (Instant::now(), cpu_seconds(), f64::MAX, 0.0);
        while begin.elapsed().as_secs_f64() < SECONDS || count < 3.0 {
            let start = Instant::now();
            run();
            gpu.wait().expect("the case runs");
            best = best.min(start.elapsed().as_secs_f64());
            count += 1.0;
        }
        let rate = case.flops / best;
        let per_cpu = match (cpu, cpu_seconds(), gpu.tier().cpu) {
            (Some(a), Some(b), true) => {
                let rate = case.flops * count / (b - a) * cores as f64;
                format!(" ({:6.1} by CPU time)", rate / 1e9)
            }
            _ => String::new(),
        };
        let ratio = match &torch {
            Some(seconds) => format!("{:.3} of PyTorch, {threads} threads", seconds[i] / best),
            None => format!("{:.3} of multiply-adds alone", rate / probe),
        };
        println!(
            "{:44} {:8.1} GFLOP/s{per_cpu} {:6.1} GB/s  {ratio}",
            case.name,
            rate / 1e9,
            case.bytes / best / 1e9
        );
    }
}
