//! The recipe's settings: what they leave equal, and what they change.

use std::fs;
use std::path::Path;

use lavender_wgpu::gpu::{Gpu, GpuOptions, Replay};
use lavender_wgpu::tensor::Checkpoint;
use lavender_wgpu::train::config::{Config, Mode, Precision};
use lavender_wgpu::train::metrics::{EvalMetrics, MapMetrics, StepMetrics, read, read_lines};
use lavender_wgpu::train::recipe::{Observer, Training};
use lavender_wgpu::train::rundir::RunDir;

use crate::support::{gpu, reference};
use crate::ten_steps::{config, losses, relative, store};

/// Keeps what it is told.
#[derive(Default)]
struct Notes(Vec<String>);

impl Observer for Notes {
    fn step(&mut self, _: &StepMetrics, _: u64) {}

    fn interrupted(&self) -> bool {
        false
    }

    fn note(&mut self, message: &str) {
        self.0.push(message.to_owned());
    }
}

/// The fixture's recipe in a directory of its own, with the targets made.
struct Case {
    dir: tempfile::TempDir,
    config: Config,
}

fn case_of(family: &str) -> Case {
    let fixture = reference(&format!("train_{family}"));
    let dir = tempfile::tempdir().unwrap();
    store(&fixture, &dir.path().join("targets"));
    let config = config(family, &fixture, dir.path());
    Case { dir, config }
}

fn case() -> Case {
    case_of("smolvlm")
}

/// A finished run: its steps, its directory, what was said.
struct Done {
    steps: Vec<StepMetrics>,
    run: RunDir,
    notes: Vec<String>,
}

impl Case {
    fn run_on(&self, gpu: &Gpu, name: &str, change: impl Fn(&mut Config)) -> Done {
        let mut config = self.config.clone();
        config.train.steps = Some(5);
        config.train.checkpoint_every = 0;
        config.run.dir = Some(self.dir.path().join(name));
        change(&mut config);
        let run = RunDir::create(&config).unwrap();
        let mut notes = Notes::default();
        let mut training = Training::new(gpu, &config).unwrap();
        training.run(gpu, &run, &mut notes).unwrap();
        Done {
            steps: read(run.metrics()).unwrap(),
            run,
            notes: notes.0,
        }
    }

    fn run(&self, name: &str, change: impl Fn(&mut Config)) -> Done {
        self.run_on(gpu(), name, change)
    }
}

/// The first step to 2e-5, for sums in another order; the later ones and the weights to 5e-4, for Adam lifts the
/// rounding of gradients that are nearly zero.
fn assert_same(a: &Done, b: &Done) {
    assert_eq!(a.steps.len(), b.steps.len());
    for (a, b) in a.steps.iter().zip(&b.steps) {
        let tolerance = if a.step == 0 { 2e-5 } else { 5e-4 };
        let close = |x: f64, y: f64| (x - y).abs() <= tolerance * y.abs();
        assert!(close(a.lm_loss, b.lm_loss), "{a:?}\n{b:?}");
        assert!(close(a.attn_loss, b.attn_loss), "{a:?}\n{b:?}");
        assert!(close(a.grad_norm, b.grad_norm), "{a:?}\n{b:?}");
        assert_eq!((a.matched_words, a.tokens), (b.matched_words, b.tokens));
    }
    let weights = |run: &RunDir| Checkpoint::open(&run.lora(), "adapter_model").unwrap();
    let (a, b) = (weights(&a.run), weights(&b.run));
    for name in a.names() {
        let error = relative(&a.values(name).unwrap().0, &b.values(name).unwrap().0);
        assert!(error < 5e-4, "{name}: {error}");
    }
}

#[test]
fn accumulated_micro_batches_are_one_large_batch() {
    let case = case();
    let whole = case.run("whole", |c| c.train.batch = 4);
    // One of the four samples has no word, and all have other numbers of labels.
    for (name, batch, accumulate) in [("pairs", 2, 2), ("single", 1, 4)] {
        let parts = case.run(name, |c| {
            (c.train.batch, c.train.accumulate) = (batch, accumulate);
        });
        assert_same(&parts, &whole);
    }
}

#[test]
fn recomputed_activations_and_padded_lengths_leave_the_losses() {
    let case = case();
    // GPUs of their own: the shared one holds other tests' memory too.
    let plain = case.run_on(&limited(None), "plain", |_| {});
    let bucket = case.run("bucket", |c| c.train.bucket = 64);
    assert_same(&bucket, &plain);
    let checkpointed = case.run_on(&limited(None), "recomputed", |c| {
        c.train.checkpoint_activations = true;
    });
    assert_same(&checkpointed, &plain);
    let peak = |done: &Done| done.steps.iter().map(|s| s.peak_bytes).max();
    assert!(peak(&checkpointed) < peak(&plain));
}

/// Trains with `change` once replaying and once not, and expects the same bits.
fn assert_replays(family: &str, change: impl Fn(&mut Config)) {
    let case = case_of(family);
    let change = |c: &mut Config| {
        (c.train.batch, c.train.accumulate, c.train.bucket) = (2, 2, 64);
        change(c);
    };
    let gpu = opened(None, Replay::On);
    let replayed = case.run_on(&gpu, "replayed", change);
    let (ready, all) = (gpu.replayed(), gpu.dispatches());
    assert!(4 * ready > all, "{ready} of {all} dispatches replayed");
    let plain = case.run_on(&limited(None), "plain", change);
    let figures = |done: &Done| -> Vec<[f64; 3]> {
        let of = |s: &StepMetrics| [s.lm_loss, s.attn_loss, s.grad_norm];
        done.steps.iter().map(of).collect()
    };
    assert_eq!(figures(&replayed), figures(&plain));
    let lora = |done: &Done| fs::read(done.run.lora().join("adapter_model.safetensors"));
    assert_eq!(lora(&replayed).unwrap(), lora(&plain).unwrap());
}

#[test]
fn replayed_steps_are_the_steps_bit_by_bit() {
    assert_replays("smolvlm", |_| {});
}

#[test]
fn replayed_steps_without_guidance_too() {
    assert_replays("smolvlm", |c| c.loss.lambda = 0.0);
}

#[test]
fn replayed_steps_that_recompute_their_activations_too() {
    assert_replays("smolvlm", |c| c.train.checkpoint_activations = true);
}

#[test]
fn replayed_steps_of_a_cross_attention_model_too() {
    assert_replays("mllama", |_| {});
}

/// A GPU of its own, that may hold so much.
fn limited(max_bytes: Option<u64>) -> Gpu {
    opened(max_bytes, Replay::Off)
}

fn opened(max_bytes: Option<u64>, replay: Replay) -> Gpu {
    let options = GpuOptions {
        max_bytes,
        replay,
        ..GpuOptions::default()
    };
    Gpu::new(&options).unwrap()
}

#[test]
fn out_of_memory_halves_the_micro_batch_and_the_step_is_the_same() {
    halves_the_micro_batch(Replay::Off);
}

#[test]
fn out_of_memory_where_steps_are_replayed_halves_the_micro_batch_too() {
    halves_the_micro_batch(Replay::On);
}

#[test]
fn out_of_memory_with_single_samples_ends_the_replaying() {
    let case = case();
    let single = |name: &str, gpu: &Gpu| {
        case.run_on(gpu, name, |c| {
            (c.train.batch, c.train.accumulate, c.train.bucket) = (1, 1, 64);
            c.train.mode = Mode::Full;
        })
    };
    let peak = |done: &Done| done.steps.iter().map(|s| s.peak_bytes).max().unwrap();
    let plain = single("plain", &limited(None));
    let replayed = single("replayed", &opened(None, Replay::On));
    assert!(peak(&plain) < peak(&replayed));
    let most = Some((peak(&plain) + peak(&replayed)) / 2);
    let done = single("small", &opened(most, Replay::On));
    assert!(
        done.notes[0].contains("without replaying"),
        "{:?}",
        done.notes
    );
    let losses = |done: &Done| -> Vec<f64> { done.steps.iter().map(|s| s.lm_loss).collect() };
    assert_eq!(losses(&done), losses(&plain));
}

fn halves_the_micro_batch(replay: Replay) {
    let case = case();
    let held = |name: &str, batch: usize| {
        let done = case.run_on(&opened(None, replay), name, |c| {
            (c.train.batch, c.train.accumulate) = (batch, 4 / batch);
        });
        let peak = done.steps.iter().map(|s| s.peak_bytes).max().unwrap();
        (peak, done)
    };
    let (four, whole) = held("whole", 4);
    let (two, _) = held("pairs", 2);
    assert!(two < four);
    let small = opened(Some((two + four) / 2), replay);
    let done = case.run_on(&small, "small", |c| c.train.batch = 4);
    let note = done.notes.first().expect("a note");
    for part in [
        "out of GPU memory",
        "step 0",
        "train.batch = 2",
        "train.accumulate = 2",
        "4 samples",
    ] {
        assert!(note.contains(part), "{note}");
    }
    assert_same(&done, &whole);
}

#[test]
fn f16_follows_f32_and_an_overflow_halves_the_scale_and_skips_the_update() {
    if !gpu().tier().f16 {
        return;
    }
    let case = case();
    // Eleven bits of mantissa through a few layers. With the attention loss two runs part by themselves, about fourfold
    // a step (measured 0.001, 0.006, 0.017, 0.08 with the kernels of CPU drivers, 0.12 in the fourth with those of GPUs), so
    // gradients are held tightly where weights stand still.
    let lambda = case.config.loss.lambda;
    let rate = case.config.optimizer.lr;
    let fourth = if gpu().tier().cpu { 0.1 } else { 0.25 };
    for (lambda, rate, tolerances) in [
        (0.0, rate, &[0.002; 5][..]),
        (lambda, 1e-12, &[0.01; 5]),
        (lambda, rate, &[0.004, 0.016, 0.06, fourth]),
    ] {
        let run = |name: &str, precision| {
            case.run(&format!("{name}-{lambda}-{rate}"), |c| {
                (c.loss.lambda, c.optimizer.lr) = (lambda, rate);
                c.train.precision = precision;
            })
        };
        let (exact, half) = (run("f32", Precision::F32), run("f16", Precision::F16));
        for (number, (a, b)) in half.steps.iter().zip(&exact.steps).enumerate() {
            assert!(!a.skipped && a.loss_scale == Some(65536.0), "{a:?}");
            assert!((a.loss - b.loss).abs() < 0.01 * b.loss, "{a:?}\n{b:?}");
            let off = (a.grad_norm - b.grad_norm).abs() / b.grad_norm;
            let held = tolerances.get(number).is_none_or(|t| off < *t);
            assert!(held, "{a:?}\n{b:?}");
        }
    }
    let steps = case
        .run("overflow", |c| {
            c.train.precision = Precision::F16;
            c.loss.lambda = 1e5;
            c.train.steps = Some(20);
        })
        .steps;
    let skipped = steps.iter().take_while(|s| s.skipped).count();
    assert!((1..16).contains(&skipped), "{skipped} skipped");
    for (number, step) in steps.iter().enumerate().take(skipped + 1) {
        assert_eq!(
            step.loss_scale,
            Some(65536.0 / f64::from(1 << number)),
            "{step:?}"
        );
    }
    // What was skipped left the weights alone: samples come again every second step.
    if skipped >= 3 {
        assert_eq!(steps[0].loss, steps[2].loss);
    }
    assert!(steps[skipped].grad_norm > 0.0);
}

#[test]
fn word_maps_are_drawn_on_the_way_and_leave_the_run_as_it_was() {
    let case = case();
    let plain = case.run("plain", |c| c.lora.dropout = 0.1);
    let start = |name: &str| {
        let mut config = case.config.clone();
        config.lora.dropout = 0.1;
        config.train.steps = Some(5);
        config.train.checkpoint_every = 3;
        config.run.dir = Some(case.dir.path().join(name));
        (config.run.pictures, config.run.pictures_every) = (2, 2);
        (RunDir::create(&config).unwrap(), config)
    };
    let (run, config) = start("drawn");
    let mut training = Training::new(gpu(), &config).unwrap();
    training.keep_maps(gpu()).unwrap();
    training.run(gpu(), &run, &mut Notes::default()).unwrap();
    let figures = |run: &RunDir| -> Vec<_> {
        let steps = read(run.metrics()).unwrap();
        let steps = steps
            .iter()
            .map(|m| (m.loss, m.lm_loss, m.attn_loss, m.grad_norm));
        steps.collect()
    };
    assert_eq!(figures(&run), figures(&plain.run));
    let weights = |run: &RunDir| fs::read(run.lora().join("adapter_model.safetensors")).unwrap();
    assert_eq!(weights(&run), weights(&plain.run));

    let names = |dir: &Path| {
        let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
        let mut names: Vec<_> = entries
            .filter(|path| path.extension().is_some_and(|e| e == "png"))
            .map(|path| path.file_name().unwrap().to_owned())
            .collect();
        names.sort();
        names
    };
    let drawn = names(&run.maps());
    assert_eq!(drawn.len(), 2);
    for step in [2, 4] {
        assert_eq!(names(&run.maps_at(step)), drawn, "step {step}");
    }
    assert!(!run.maps_at(3).exists() && !run.maps_at(5).exists());
    let picture = |dir: &Path| fs::read(dir.join(&drawn[0])).unwrap();
    assert!(picture(&run.maps_at(2)) != picture(&run.maps_at(4)));
    let maps: Vec<MapMetrics> = read_lines(run.map_figures()).unwrap();
    let steps: Vec<u64> = maps.iter().map(|m| m.step).collect();
    assert_eq!(steps, [0, 2, 4, 5]);
    for line in &maps {
        // The entropy of a uniform map of 32 × 32 is ln 1024 = 6.93.
        assert!(
            line.words > 0 && (0.1..6.94).contains(&line.entropy),
            "{line:?}"
        );
        assert!((0.0..1.0).contains(&line.distance), "{line:?}");
        assert_eq!(line.target_entropy, maps[0].target_entropy);
    }

    // A resumed run has the maps from before the first step beside its own.
    let (run, _) = start("resumed");
    fs::create_dir_all(run.checkpoints()).unwrap();
    let from = case.dir.path().join("drawn/checkpoints/step-3");
    let to = run.checkpoints().join("step-3");
    fs::rename(from, to).unwrap();
    let (run, config, from) = RunDir::open(run.root()).unwrap();
    let mut training = Training::new(gpu(), &config).unwrap();
    training.keep_maps(gpu()).unwrap();
    training.restore(&from.unwrap()).unwrap();
    training.run(gpu(), &run, &mut Notes::default()).unwrap();
    let whole = case.dir.path().join("drawn/maps/step-4");
    assert!(picture(&run.maps_at(4)) == picture(&whole));
    assert!(!run.maps_at(2).exists());
}

fn evaluations(run: &RunDir) -> Vec<EvalMetrics> {
    read_lines(run.evaluations()).unwrap()
}

fn checkpoints(run: &RunDir) -> Vec<String> {
    let entries = fs::read_dir(run.checkpoints()).unwrap();
    let mut names: Vec<String> = entries
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn evaluations_stop_a_run_that_does_not_improve_and_the_best_checkpoint_stays() {
    let case = case();
    let change = |c: &mut Config| {
        // Too little to move a weight: no evaluation after the first is better.
        c.optimizer.lr = 1e-30;
        c.train.batch = 4;
        c.eval.path = Some(c.data.path.clone());
        c.eval.images = c.data.images.clone();
        c.eval.targets = c.data.targets.clone();
        c.eval.every = 1;
        c.train.early_stop = 2;
        c.train.keep = 1;
        c.train.checkpoint_every = 1;
        c.train.steps = Some(9);
    };
    let done = case.run("eval", change);
    let found = evaluations(&done.run);
    assert_eq!(done.steps.len(), 3);
    assert_eq!(
        found.iter().map(|e| e.best).collect::<Vec<_>>(),
        [true, false, false]
    );
    assert_eq!(checkpoints(&done.run), ["step-1", "step-3"]);
    assert!(done.notes[0].contains("stopped after 3 of 9") && done.notes[0].contains("step-1"));
    // The evaluation of the training samples themselves is their step's loss.
    let (step, eval) = (&done.steps[1], &found[0]);
    assert!((step.lm_loss - eval.lm_loss).abs() < 1e-5 * step.lm_loss);
    assert!((step.attn_loss - eval.attn_loss).abs() < 1e-5 * step.attn_loss);
    assert_eq!(
        (eval.step, eval.samples, eval.matched_words),
        (1, 4, step.matched_words)
    );
    assert!((eval.loss - step.loss).abs() < 1e-5 * step.loss);

    // Going on, it is still stopped.
    let (run, config, from) = RunDir::open(done.run.root()).unwrap();
    let mut training = Training::new(gpu(), &config).unwrap();
    training.restore(&from.unwrap()).unwrap();
    training.run(gpu(), &run, &mut Notes::default()).unwrap();
    assert_eq!(read(run.metrics()).unwrap().len(), 3);
    assert_eq!(evaluations(&run), found);
}

#[test]
fn a_share_of_the_images_is_held_out() {
    let case = case();
    let done = case.run("share", |c| {
        c.eval.share = 0.25;
        c.train.steps = None;
        c.train.epochs = Some(2);
    });
    // Three of four samples in batches of two.
    assert_eq!(done.steps.len(), 4);
    let found = evaluations(&done.run);
    assert_eq!((found.len(), found[0].samples, found[0].step), (1, 1, 4));
    assert!(found[0].eval && found[0].lm_loss > 0.0);
}

fn refusal(case: &Case, change: impl Fn(&mut Config)) -> String {
    let mut config = case.config.clone();
    change(&mut config);
    match Training::new(gpu(), &config) {
        Ok(_) => panic!("not refused"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn frozen_and_excluded_parts_have_no_factors_and_nothing_to_train_is_refused() {
    let case = case();
    let done = case.run("frozen", |c| {
        c.init.lora = None;
        c.train.freeze = vec!["vision".into(), "layers.0-1".into()];
        c.lora.exclude_modules = vec!["v_proj".into()];
    });
    let factors = Checkpoint::open(&done.run.lora(), "adapter_model").unwrap();
    let names: Vec<&str> = factors.names().collect();
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(
        names
            .iter()
            .all(|n| n.contains("text_model.layers.2.self_attn.q_proj"))
    );
    // PEFT takes the modules from the list of whole paths.
    let text = fs::read_to_string(done.run.lora().join("adapter_config.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let wanted = serde_json::json!(["model.text_model.layers.2.self_attn.q_proj"]);
    assert_eq!(
        (&json["target_modules"], &json["exclude_modules"]),
        (&wanted, &serde_json::Value::Null)
    );

    let error = refusal(&case, |c| c.train.freeze = vec!["layers.7-9".into()]);
    assert!(
        error.contains("train.freeze: `layers.7-9` matches no tensor"),
        "{error}"
    );
    let everything = vec!["vision".to_owned(), "connector".into(), "language".into()];
    for mode in [Mode::Lora, Mode::Full] {
        let error = refusal(&case, |c| {
            (c.train.mode, c.train.freeze) = (mode, everything.clone());
            c.init.lora = None;
        });
        assert!(error.contains("nothing would be trained"), "{error}");
    }
}

fn full(case: &Case) -> Done {
    let fixture = reference("train_smolvlm_full");
    let recipe = losses(&fixture)["recipe"].clone();
    case.run("full", |c| {
        c.train.mode = Mode::Full;
        c.train.freeze = vec!["connector".into(), "layers.0".into()];
        c.train.steps = Some(10);
        c.init.lora = None;
        c.init.aligner = Some(fixture.join("init/aligner.safetensors"));
        c.aligner.hidden = recipe["hidden"].as_u64().unwrap() as usize;
        c.optimizer.lr = recipe["lr"].as_f64().unwrap();
    })
}

#[test]
fn a_full_fine_tune_trains_as_pytorch_does_and_leaves_a_model() {
    let (case, fixture) = (case(), reference("train_smolvlm_full"));
    let done = full(&case);
    let expected = losses(&fixture)["steps"].clone();
    for (step, expected) in done.steps.iter().zip(expected.as_array().unwrap()) {
        for (what, value) in step.scalars() {
            let Some(wanted) = expected[what].as_f64().filter(|_| what != "tokens") else {
                continue;
            };
            let error = (value - wanted).abs() / wanted.abs().max(1e-6);
            assert!(
                error < 1e-4,
                "step {} {what}: {value} found, {wanted} expected",
                step.step
            );
        }
    }
    let (model, base) = (done.run.model(), reference("smolvlm/a"));
    let trained = Checkpoint::open(&model, "model").unwrap();
    let before = Checkpoint::open(&base, "model").unwrap();
    let wanted = Checkpoint::open(&fixture.join("final.safetensors"), "final").unwrap();
    for name in wanted.names().filter(|name| !name.starts_with("aligner.")) {
        let expected = wanted.values(name).unwrap();
        let found = trained.values(name).unwrap();
        assert_eq!(found.1, expected.1, "{name}");
        // Of what training changed, not of the weight: what is frozen is the base's to the bit.
        let base = before.values(name).unwrap().0;
        let moved = |values: &[f32]| {
            values
                .iter()
                .zip(&base)
                .map(|(v, b)| v - b)
                .collect::<Vec<_>>()
        };
        let error = relative(&moved(&found.0), &moved(&expected.0));
        match name.contains("layers.0.self_attn.q_proj") && name.contains("text_model") {
            true => assert_eq!(found.0, base, "{name}"),
            false => assert!(error < 2e-2, "{name}: {error}"),
        }
    }
    assert!(trained.names().eq(before.names()));
    for file in ["config.json", "tokenizer.json"] {
        let read = |dir: &Path| fs::read(dir.join(file)).unwrap();
        assert_eq!(read(&model), read(&base), "{file}");
    }
    assert!(done.run.aligner().is_file() && !done.run.lora().exists());

    // Resumed from its last checkpoint it writes the same model again.
    let bytes = fs::read(model.join("model.safetensors")).unwrap();
    let (run, config, from) = RunDir::open(done.run.root()).unwrap();
    let mut training = Training::new(gpu(), &config).unwrap();
    training.restore(&from.unwrap()).unwrap();
    training.run(gpu(), &run, &mut Notes::default()).unwrap();
    assert_eq!(fs::read(model.join("model.safetensors")).unwrap(), bytes);
}

#[test]
fn the_estimate_is_near_the_measured_peak() {
    let case = case();
    type Change = fn(&mut Config);
    let changes: [(&str, Change); 4] = [
        ("pairs", |_| {}),
        ("all", |c| c.train.batch = 4),
        ("recomputed", |c| c.train.checkpoint_activations = true),
        ("full", |c| {
            c.train.mode = Mode::Full;
            c.init.lora = None;
        }),
    ];
    for (name, change) in changes {
        let gpu = limited(None);
        let mut config = case.config.clone();
        change(&mut config);
        let estimated = Training::new(&gpu, &config).unwrap().estimate.peak();
        let done = case.run_on(&gpu, name, |c| {
            change(c);
            c.train.steps = Some(2);
        });
        let peak = done.steps.iter().map(|s| s.peak_bytes).max().unwrap();
        // Size classes, and what drivers on the CPU pad, are not in it.
        let ratio = peak as f64 / estimated as f64;
        assert!(
            (0.5..2.0).contains(&ratio),
            "{name}: {peak} bytes, {estimated} estimated"
        );
    }
}
