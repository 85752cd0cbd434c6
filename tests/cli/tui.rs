//! `train --tui`: what is drawn, on a terminal in memory; keys; where there is no terminal.

use lavender_wgpu::cli::tui::{Asked, Dashboard, asked};
use lavender_wgpu::train::metrics::{EvalMetrics, StepMetrics};
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use crate::support::refused_with;

fn step(step: u64) -> StepMetrics {
    StepMetrics {
        step,
        loss: 4.0 - step as f64 / 40.0,
        lm_loss: 2.5,
        attn_loss: 0.125,
        matched_words: 31,
        lr: 2e-4,
        grad_norm: 0.75,
        tokens: 500,
        step_ms: 2000.0,
        data_ms: 125.0,
        peak_bytes: 3 << 30,
        ..StepMetrics::default()
    }
}

/// A run that goes on after 20 of 100 steps, three steps later.
fn dashboard() -> Dashboard {
    let evaluation = |step, loss, best| EvalMetrics {
        step,
        loss,
        best,
        ..EvalMetrics::default()
    };
    let earlier = (0..20).map(step).collect();
    let mut shown = Dashboard::new(
        "runs/007 on a GPU".into(),
        100,
        earlier,
        vec![evaluation(10, 3.25, true)],
    );
    (20..23).for_each(|number| shown.step(&step(number)));
    shown.evaluated(&evaluation(20, 3.5, false));
    shown.note("out of GPU memory; going on with train.batch = 2");
    shown
}

/// The lines on a terminal of this size.
fn drawn(shown: &Dashboard, width: u16, height: u16) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| shown.draw(frame)).unwrap();
    let buffer = terminal.backend().buffer();
    let cells: Vec<&str> = buffer.content().iter().map(|cell| cell.symbol()).collect();
    cells
        .chunks(usize::from(width).max(1))
        .map(<[&str]>::concat)
        .collect()
}

#[test]
fn curves_figures_notes_and_time_left_are_drawn() {
    let text = drawn(&dashboard(), 120, 40).join("\n");
    for part in [
        "runs/007 on a GPU",
        "step 23 of 100",
        // 77 steps of 2 s.
        "2 min 34 s left",
        " loss 3.450 ",
        " language loss 2.500 ",
        " attention loss 0.1250 ",
        " learning rate 2e-4 ",
        " tokens/s 250 ",
        " gradient norm 0.7500 ",
        "31 words matched",
        "2000 ms, 125 of it for data",
        "3072 MiB",
        "evaluation after 20 steps: loss 3.500; the best 3.250 after 10",
        "out of GPU memory; going on",
        "q or Ctrl-C: finish the step",
    ] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    // Lines of curves are in Braille, evaluations dots.
    assert!(
        text.chars()
            .filter(|c| ('\u{2801}'..='\u{28ff}').contains(c))
            .count()
            > 50,
        "{text}"
    );
    assert!(text.contains('•'), "{text}");
    let mut stopping = dashboard();
    stopping.stop();
    let text = drawn(&stopping, 120, 40).join("\n");
    assert!(
        text.contains("stopping after this step") && !text.contains("q or"),
        "{text}"
    );
}

#[test]
fn a_terminal_of_any_size_and_a_run_without_a_step_are_drawn() {
    let empty = || Dashboard::new("r".into(), 0, Vec::new(), Vec::new());
    for (width, height) in [
        (1, 1),
        (3, 2),
        (20, 5),
        (40, 12),
        (80, 24),
        (300, 9),
        (15, 90),
    ] {
        drawn(&empty(), width, height);
        drawn(&dashboard(), width, height);
    }
    let text = drawn(&empty(), 100, 30).join("\n");
    assert!(
        text.contains("step 0 of 0") && text.contains("compiles kernels"),
        "{text}"
    );
    let small = drawn(&dashboard(), 60, 12).join("\n");
    assert!(
        small.contains(" loss 3.450 ") && !small.contains("tokens/s"),
        "{small}"
    );
    // A long run has more steps than a terminal has dots.
    let steps: Vec<StepMetrics> = (0..5000).map(step).collect();
    let long = Dashboard::new("r".into(), 5000, steps, Vec::new());
    assert!(
        drawn(&long, 100, 30)
            .join("\n")
            .contains("step 5000 of 5000")
    );
}

#[test]
fn q_stops_and_ctrl_c_interrupts() {
    let key = |code, modifiers| asked(&KeyEvent::new(code, modifiers));
    assert_eq!(
        key(KeyCode::Char('q'), KeyModifiers::NONE),
        Some(Asked::Stop)
    );
    assert_eq!(
        key(KeyCode::Char('c'), KeyModifiers::CONTROL),
        Some(Asked::Interrupt)
    );
    assert_eq!(key(KeyCode::Char('c'), KeyModifiers::NONE), None);
    assert_eq!(key(KeyCode::Enter, KeyModifiers::NONE), None);
    let released = KeyEvent::new_with_kind(
        KeyCode::Char('q'),
        KeyModifiers::NONE,
        KeyEventKind::Release,
    );
    assert_eq!(asked(&released), None);
}

#[test]
fn without_a_terminal_it_is_refused_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("run");
    let set = format!("run.dir={}", root.display());
    refused_with(
        &["train", "--tui", "--set", &set],
        &["--tui", "no terminal"],
    );
    assert!(!root.exists());
}

/// The program in a terminal of its own, by util-linux's `script`; `None` where there is none.
#[cfg(target_os = "linux")]
mod terminal {
    use std::fs;
    use std::io::{Read, Write};
    use std::path::Path;
    use std::process::{Command, Stdio};

    use crate::support::program;

    const ENTER: &str = "\u{1b}[?1049h";
    const LEAVE: &str = "\u{1b}[?1049l";

    /// Exit code, and all that the terminal was sent; `keys` are typed once the screen is there.
    fn typed(args: &[&str], keys: &str) -> Option<(i32, String)> {
        let mut line = program();
        line.args(args);
        let words = std::iter::once(line.get_program()).chain(line.get_args());
        let quoted = words.map(|word| format!("'{}'", word.to_str().unwrap()));
        let quoted: Vec<String> = quoted.collect();
        let mut command = Command::new("script");
        command.args(["-qec", &quoted.join(" "), "/dev/null"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().ok()?;
        let (mut input, mut output) = (child.stdin.take()?, child.stdout.take()?);
        let (mut text, mut part) = (String::new(), [0; 4096]);
        let mut waiting = true;
        while let Ok(count @ 1..) = output.read(&mut part) {
            text += &String::from_utf8_lossy(&part[..count]);
            if waiting && text.contains(ENTER) {
                waiting = false;
                input.write_all(keys.as_bytes()).unwrap();
            }
        }
        Some((child.wait().unwrap().code().unwrap(), text))
    }

    fn config(dir: &Path, more: &str) -> String {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference");
        let text = format!(
            "[model]\npath = '{0}/smolvlm/a'\n[data]\npath = '{0}/train_smolvlm/data.jsonl'\n\
             images = '{0}/mllama/images'\n[run]\ndir = '{1}/run'\n{more}",
            root.display(),
            dir.display()
        );
        let path = dir.join("config.toml");
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn it_is_put_back_after_q_and_after_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = config(dir.path(), "[train]\nbatch = 2\nsteps = 5000\n");
        let Some((code, text)) = typed(&["train", &path, "--tui"], "q") else {
            eprintln!("no `script` here: not tested");
            return;
        };
        assert_eq!(code, 130, "{text}");
        let (_, after) = text.rsplit_once(LEAVE).unwrap();
        assert!(
            text.contains(ENTER) && after.contains("interrupted"),
            "{after:?}"
        );
        let root = dir.path().join("run");
        let steps = fs::read_to_string(root.join("metrics.jsonl"))
            .unwrap()
            .lines()
            .count();
        assert!((1..5000).contains(&steps), "{steps}");
        assert!(
            root.join(format!("checkpoints/step-{steps}/state.json"))
                .is_file()
        );

        let dir = tempfile::tempdir().unwrap();
        let path = config(
            dir.path(),
            "[train]\nbatch = 2\nsteps = 9\n[optimizer]\nlr = 1e30\n\
             [lora]\ntarget_modules = ['q_proj', 'k_proj']\n",
        );
        let (code, text) = typed(&["train", &path, "--tui"], "").unwrap();
        assert_eq!(code, 1, "{text}");
        let (_, after) = text.rsplit_once(LEAVE).unwrap();
        assert!(after.contains("error: step 1: "), "{after:?}");
    }
}
