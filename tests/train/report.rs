//! The pages of runs, from what lies in their directories.

use std::fs;
use std::path::Path;

use image::{Rgb, RgbImage};
use lavender_wgpu::align::picture::{WordMaps, save_png, word_sheet};
use lavender_wgpu::eval::drawn::Figures;
use lavender_wgpu::gpu::Tier;
use lavender_wgpu::train::config::Config;
use lavender_wgpu::train::metrics::{EvalMetrics, Line, Log, MapMetrics, StepMetrics};
use lavender_wgpu::train::record::{HeldOut, Outcome, Record};
use lavender_wgpu::train::report::{Comparison, RunReport};
use lavender_wgpu::train::rundir::RunDir;

fn append<T: Line>(path: &Path, lines: impl IntoIterator<Item = T>) {
    let mut log = Log::open(path, 0).unwrap();
    for line in lines {
        log.append(&line).unwrap();
    }
}

/// A run of 40 steps whose losses fall from `loss`, stopped by Ctrl-C and finished by a second start.
fn run(dir: &Path, loss: f64, sets: &[&str]) -> RunDir {
    let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
    let mut config = Config::default().with(&sets).unwrap();
    config.run.dir = Some(dir.to_path_buf());
    let run = RunDir::create(&config).unwrap();
    let steps = (0..40u64).map(|step| StepMetrics {
        step,
        loss: loss - step as f64 / 40.0,
        lm_loss: loss / 2.0,
        attn_loss: 0.25,
        matched_words: 3,
        lr: 1e-4,
        grad_norm: 0.5,
        tokens: 120,
        step_ms: if step == 0 { 9000.0 } else { 100.0 },
        peak_bytes: 512 << 20,
        ..StepMetrics::default()
    });
    append(&run.metrics(), steps);
    let evaluations = [20, 40].map(|step| EvalMetrics {
        eval: true,
        step,
        loss: loss + step as f64,
        best: step == 20,
        ..EvalMetrics::default()
    });
    append(&run.evaluations(), evaluations);
    let maps = [(0, 6.5), (20, 6.0), (40, 5.5), (40, 5.25)].map(|(step, entropy)| MapMetrics {
        step,
        words: 7,
        entropy,
        target_entropy: 4.125,
        distance: 0.0625,
    });
    append(&run.map_figures(), maps);
    let mut record = Record {
        total_steps: 40,
        samples: 17,
        held_out: Some(HeldOut {
            scenes: 48,
            before: Figures::default(),
            after: Some(Figures {
                answer_accuracy: 0.875,
                ..Figures::default()
            }),
        }),
        ..Record::default()
    };
    let mut tier = Tier::default();
    (tier.name, tier.driver) = ("GPU <one>".into(), "Vulkan 1".into());
    record.begin(&tier, 0);
    record.end(16, 4.0, &Err(lavender_wgpu::Error::Interrupted));
    record.begin(&tier, 16);
    record.end(40, 95.0, &Ok(()));
    record.write(&run).unwrap();
    let map = vec![0.5; 16];
    let word = WordMaps {
        word: "cat",
        target: Some(&map),
        before: Some(&map),
        after: Some(&map),
    };
    let image = RgbImage::from_pixel(8, 8, Rgb([200, 10, 10]));
    let sheet = word_sheet(&image, &[word; 15]);
    save_png(run.maps().join("sample-1.png"), &sheet).unwrap();
    save_png(run.maps_at(20).join("sample-1.png"), &sheet).unwrap();
    run
}

/// The pictures inside a page.
fn pictures(page: &str) -> Vec<RgbImage> {
    use base64::Engine;
    let parts = page.split("data:image/jpeg;base64,").skip(1);
    parts
        .map(|rest| {
            let text = rest.split('"').next().unwrap();
            let bytes = base64::engine::general_purpose::STANDARD.decode(text);
            image::load_from_memory(&bytes.unwrap())
                .unwrap()
                .into_rgb8()
        })
        .collect()
}

/// The page as people see it, without pictures.
fn readable(page: &str) -> String {
    let mut parts = page.split("base64,");
    let first = parts.next().unwrap_or_default().to_owned();
    let rest = parts.map(|part| &part[part.find('"').unwrap()..]);
    (first + &rest.collect::<String>()).replace("&#x2f;", "/")
}

fn assert_has(page: &str, parts: &[&str]) {
    let page = readable(page);
    for part in parts {
        assert!(page.contains(part), "{part} in {page}");
    }
}

/// A page stands alone and is well formed.
fn assert_page(page: &str) {
    let page = &readable(page);
    let outside = page.replace("http://www.w3.org/2000/svg", "");
    for address in ["http", "href", "src=\"/", "url(", "<script", "@import"] {
        assert!(!outside.contains(address), "{address} in {outside}");
    }
    for tag in [
        "table", "thead", "tbody", "tr", "td", "th", "figure", "div", "details", "h1", "h2", "h3",
        "svg", "style", "ul", "li", "body", "html",
    ] {
        let opens =
            page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
        assert_eq!(opens, page.matches(&format!("</{tag}>")).count(), "{tag}");
    }
}

#[test]
fn the_page_of_a_run_is_made_from_its_files_alone() {
    let dir = tempfile::tempdir().unwrap();
    let made = run(
        &dir.path().join("r-1"),
        3.0,
        &["model.path=<script>x", "train.seed=77"],
    );
    // A step that was being written, and one of the drawings, are cut off.
    let mut text = fs::read_to_string(made.metrics()).unwrap();
    text.push_str("{\"step\":40,\"los");
    fs::write(made.metrics(), text).unwrap();
    let report = RunReport::read(made.root()).unwrap();
    assert_eq!((report.steps.len(), report.name.as_str()), (40, "r-1"));
    // Of two drawings after one step the later counts.
    let entropies: Vec<f64> = report.maps.iter().map(|m| m.entropy).collect();
    assert_eq!(entropies, [6.5, 6.0, 5.25]);
    let page = report.html().unwrap();
    assert_page(&page);
    // Six of the steps, and the entropy.
    assert_eq!(page.matches("<svg").count(), 7);
    let shown = pictures(&page);
    assert_eq!(shown.len(), 1);
    // Twelve of the fifteen words.
    assert_eq!(shown[0].dimensions(), (4 * 208, 30 + 12 * 222));
    let parts = [
        "<title>Run r-1</title>",
        "finished",
        "40 of 40",
        "GPU &lt;one&gt;",
        "Vulkan 1",
        concat!("lavender-wgpu ", env!("CARGO_PKG_VERSION")),
        "<th>seed</th><td>77</td>",
        "<th>samples</th><td>17</td>",
        "steps 0 to 16, stopped by Ctrl-C after 4.0 s",
        "steps 16 to 40, finished after 1 min 35 s",
        "<td>loss</td><td>3</td><td>2.025</td><td>2.025 (step 39)</td><td>2.513</td>",
        "<td>evaluation loss</td><td>23</td><td>43</td><td>23 (step 20)</td><td>33</td>",
        "<td>step time, ms</td><td>9000</td><td>100</td><td>100 (step 1)</td>",
        "<td>attention entropy, nats (7 words that are drawn)</td><td>6.500</td><td>5.250</td><td>4.125</td>",
        "<td>answer accuracy (48 held-out scenes)</td><td>0</td><td>0.8750</td>",
        "Those of steps 20 lie",
        "sample-1",
        "[optimizer]",
        // 39 × 120 tokens in 39 × 0.1 s, without the first step.
        "<span>tokens/s</span><b>1200</b>",
        "<span>GPU memory, MiB</span><b>512</b>",
        "<span>wall time</span><b>1 min 39 s</b>",
    ];
    assert_has(&page, &parts);
}

#[test]
fn a_run_without_a_step_or_a_record_has_a_page_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.run.dir = Some(dir.path().join("r"));
    let run = RunDir::create(&config).unwrap();
    let writing = run.checkpoints().join(".writing-x");
    fs::create_dir_all(&writing).unwrap();
    let page = RunReport::read(run.root()).unwrap().html().unwrap();
    assert_page(&page);
    assert_has(
        &page,
        &["No step is done yet", "None is drawn", "not recorded"],
    );
    // Looking at a run that goes on changes nothing of it.
    assert!(writing.is_dir() && !run.report().exists());

    fs::write(run.metrics(), "{\"step\": 0}\n").unwrap();
    let error = RunReport::read(run.root()).unwrap_err().to_string();
    assert!(
        error.contains("metrics.jsonl") && error.contains("line 1"),
        "{error}"
    );
    fs::write(run.metrics(), "").unwrap();
    fs::write(run.record(), "7").unwrap();
    let error = RunReport::read(run.root()).unwrap_err().to_string();
    assert!(
        error.contains("run.json") && error.contains("not a run's record"),
        "{error}"
    );
}

#[test]
fn runs_are_compared_by_curves_figures_and_the_keys_that_differ() {
    let dir = tempfile::tempdir().unwrap();
    let place = |name: &str| dir.path().join(name);
    run(&place("a/r"), 3.0, &["loss.lambda=0"]);
    run(&place("b/r"), 2.0, &["loss.lambda=10", "eval.path=x.json"]);
    run(&place("c/r"), 2.5, &["loss.lambda=10"]);
    let read = |name: &str| RunReport::read(place(name)).unwrap();
    let comparison = Comparison::new(vec![read("a/r"), read("b/r"), read("c/r")]);
    let page = comparison.html().unwrap();
    assert_page(&page);
    // Six of the steps, three of the evaluations.
    assert_eq!(page.matches("<svg").count(), 9);
    assert_eq!(pictures(&page).len(), 3);
    let parts = [
        "<h1>3 runs compared</h1>",
        "</i>a/r</li>",
        "</i>b/r</li>",
        // Means of the last four steps: 3 − 37.5/40 and so on.
        "<td>loss</td><td>2.062</td><td>1.062</td><td>1.562</td>",
        "<td>language loss, nats/token</td><td>1.500</td><td class=\"best\">1</td><td>1.250</td>",
        "<td>attention loss</td><td>0.2500</td><td>0.2500</td><td>0.2500</td>",
        "The total losses are not of the same kind",
        "<td><code>loss.lambda</code></td><td><code>0.0</code></td><td><code>10.0</code></td><td><code>10.0</code></td>",
        "<td><code>eval.path</code></td><td><code>none</code></td><td><code>&quot;x.json&quot;</code></td><td><code>none</code></td>",
    ];
    assert_has(&page, &parts);
    assert!(!page.contains("run.dir") && !page.contains("train.seed"));
    let text = comparison.text().unwrap();
    let words = |name: &str| -> Vec<&str> {
        let line = text.lines().find(|line| line.starts_with(name));
        line.unwrap_or_else(|| panic!("{name} in {text}"))
            .split_whitespace()
            .collect()
    };
    assert_eq!(words(" "), ["a/r", "b/r", "c/r"]);
    assert_eq!(words("loss "), ["loss", "2.062", "1.062", "1.562"]);
    assert_eq!(words("loss.lambda"), ["loss.lambda", "0.0", "10.0", "10.0"]);
    assert_eq!(
        words("wall time"),
        [
            "wall", "time", "1", "min", "39", "s", "1", "min", "39", "s", "1", "min", "39", "s"
        ]
    );
    assert!(text.lines().all(|line| line == line.trim_end()));

    let error = RunReport::read(place("a")).unwrap_err().to_string();
    assert!(error.contains("not a run directory"), "{error}");
    let error = RunReport::read(place("nowhere")).unwrap_err().to_string();
    assert!(error.contains("nowhere"), "{error}");
}

#[test]
fn a_record_survives_being_written() {
    let dir = tempfile::tempdir().unwrap();
    let run = run(&dir.path().join("r"), 1.0, &[]);
    let record = Record::read(&run).unwrap().unwrap();
    let ends: Vec<_> = record
        .stretches
        .iter()
        .map(|s| (s.from, s.to, s.outcome))
        .collect();
    assert_eq!(
        ends,
        [(0, 16, Outcome::Stopped), (16, 40, Outcome::Finished)]
    );
    assert_eq!((record.seconds(), record.total_steps), (99.0, 40));
}
