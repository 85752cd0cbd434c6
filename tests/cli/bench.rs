//! `bench`: a small measurement and its report, reports side by side, wrong input. No time is asserted.

use crate::support::{program, refused_with, run, stderr, stdout};

#[test]
fn a_report_is_written_and_compared() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (json, svg) = (path("here.json"), path("both.svg"));
    let given = run(&[
        "bench",
        "kernels",
        "--filter",
        "256×256×256",
        "--filter",
        "rotary",
        "--seconds",
        "0.01",
        "--json",
        &json,
    ]);
    assert_eq!(given.status.code(), Some(0), "{}", stderr(&given));
    let report: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
    assert!(report["peak"]["gflops"].as_f64().unwrap() > 0.0);
    let kernels = report["kernels"].as_array().unwrap();
    assert_eq!(kernels.len(), 2, "{report}");
    for kernel in kernels {
        assert!(kernel["median_ms"].as_f64().unwrap() >= kernel["best_ms"].as_f64().unwrap());
        assert!(kernel["runs"].as_u64().unwrap() >= 3);
    }
    let other = path("there.json");
    std::fs::copy(&json, &other).unwrap();
    let compared = run(&["bench", "compare", &json, &other, "--plot", &svg]);
    assert_eq!(compared.status.code(), Some(0), "{}", stderr(&compared));
    let table = stdout(&compared);
    assert!(
        table.contains("rotary") && table.contains("(1.00×)"),
        "{table}"
    );
    let drawn = std::fs::read_to_string(&svg).unwrap();
    assert!(
        drawn.contains("<svg") && drawn.contains("rotary"),
        "{drawn}"
    );
}

#[test]
fn tuning_measures_and_keeps_what_it_found() {
    let dir = tempfile::tempdir().unwrap();
    let tune = |filter: &str| {
        let mut command = program();
        command.env("XDG_CACHE_HOME", dir.path());
        command.args(["bench", "--tune", "--filter", filter]);
        command.output().unwrap()
    };
    let shape = "1x128x16x576 nt f32 f32 f32";
    let given = tune(shape);
    assert_eq!(given.status.code(), Some(0), "{}", stderr(&given));
    assert!(stdout(&given).contains(shape), "{}", stdout(&given));
    let kept = std::fs::read_dir(dir.path().join("lavender-wgpu")).unwrap();
    let caches: Vec<_> = kept
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "json"))
        .collect();
    assert_eq!(caches.len(), 1, "{caches:?}");
    let cache: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&caches[0]).unwrap()).unwrap();
    let choices = cache["choices"].as_object().unwrap();
    assert_eq!(choices.len(), 1, "{cache}");
    assert!(
        choices
            .values()
            .all(|c| c["shape"] == shape && c["millis"].as_f64() > Some(0.0))
    );
    // What a refusal gives as an example can be given.
    let refused = tune("nosuch");
    assert_eq!(refused.status.code(), Some(1));
    let message = stderr(&refused);
    assert!(message.contains("--filter nosuch"), "{message}");
    let example = message.split('`').nth(1).expect("an example");
    let given = tune(example);
    assert_eq!(given.status.code(), Some(0), "{}", stderr(&given));
}

#[test]
fn wrong_input_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.json");
    std::fs::write(&file, "{\"version\":").unwrap();
    let file = file.to_str().unwrap();
    refused_with(&["bench", "compare", file], &["x.json", "no report"]);
    refused_with(&["bench", "compare", "absent.json"], &["absent.json"]);
    refused_with(
        &["bench", "kernels", "--filter", "nosuch"],
        &["nosuch", "lists them"],
    );
    refused_with(
        &["bench", "unet", "--side", "63"],
        &["--side 63", "multiple of 8"],
    );
    refused_with(&["bench", "kernels", "--seconds", "0"], &["--seconds 0"]);
}
