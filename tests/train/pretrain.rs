//! Pretraining: the committed recipes, wrong ones, and a short run whose model opens again.

use std::path::{Path, PathBuf};

use lavender_wgpu::Result;
use lavender_wgpu::train::pretrain::{Recipe, Watch};

use super::support::gpu;

fn committed(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("models/mini/recipes").join(name)
}

fn sets(list: &[&str]) -> Vec<String> {
    list.iter().map(|set| set.to_string()).collect()
}

/// Keeps every loss, and how many steps each part announced.
#[derive(Default)]
struct Kept {
    losses: Vec<f32>,
    parts: Vec<usize>,
}

impl Watch for Kept {
    fn begin(&mut self, _part: &str, steps: usize) {
        self.parts.push(steps);
    }

    fn step(&mut self, loss: f32) -> Result<()> {
        self.losses.push(loss);
        Ok(())
    }
}

#[test]
fn the_committed_recipes_are_recipes() {
    for name in ["teacher.toml", "student.toml"] {
        let recipe = Recipe::load(committed(name), &[]).unwrap();
        assert!(
            Path::new(env!("CARGO_MANIFEST_DIR"))
                .join(recipe.layout())
                .is_dir()
        );
        let changed = Recipe::load(committed(name), &sets(&["scenes.train=17"])).unwrap();
        assert_ne!(recipe, changed);
    }
}

#[test]
fn wrong_recipes_and_arguments_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(committed("student.toml")).unwrap();
    let path = dir.path().join("recipe.toml");
    for (from, to, named) in [
        ("questions = ", "question = ", "question"),
        ("kind = \"student\"", "kind = \"pupil\"", "pupil"),
        ("warmup = ", "warmup = \"soon\" # ", "soon"),
    ] {
        assert!(text.contains(from));
        std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
        let message = Recipe::load(&path, &[]).unwrap_err().to_string();
        assert!(
            message.contains(named) && message.contains("recipe.toml"),
            "{message}"
        );
    }
    for (set, named) in [
        ("student.quiz=3", "quiz"),
        ("teacher.steps=3", "teacher"),
        ("student.questions", "KEY=VALUE"),
        ("student.questions=many", "many"),
    ] {
        let message = Recipe::load(committed("student.toml"), &sets(&[set]))
            .unwrap_err()
            .to_string();
        assert!(
            message.contains(named) && message.contains("--set"),
            "{message}"
        );
    }
}

#[test]
fn a_short_student_run_learns_repeats_and_opens_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = Recipe::load(
        committed("student.toml"),
        &sets(&[
            "scenes.train=4",
            "scenes.held_out=2",
            "student.questions=1",
            "student.schedule.steps=6",
            "student.schedule.batch=2",
            "student.schedule.warmup=1",
        ]),
    )
    .unwrap();
    let Recipe::Student(student) = &mut recipe else {
        panic!("a student's recipe")
    };
    student.layout = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/mini/student");
    let run = |name: &str| {
        let mut kept = Kept::default();
        let out = dir.path().join(name);
        let figures = recipe.run(gpu(), &out, &mut kept).unwrap();
        let weights = std::fs::read(out.join("model.safetensors")).unwrap();
        assert!(out.join("tokenizer.json").is_file());
        // Measured on the weights as written and read again.
        assert!(
            figures
                .iter()
                .any(|f| f.name == "answer loss" && f.value.is_finite())
        );
        (kept, weights)
    };
    let (first, weights) = run("a");
    assert_eq!(
        (first.parts.as_slice(), first.losses.len()),
        ([6].as_slice(), 6)
    );
    // A uniform guess over the vocabulary of 386 costs ln 386 = 5.95; the start is near it.
    assert!((first.losses[0] - 5.95).abs() < 0.5, "{:?}", first.losses);
    assert!(
        first.losses[5] < first.losses[0] - 0.3,
        "{:?}",
        first.losses
    );
    let (second, again) = run("b");
    assert_eq!(first.losses, second.losses);
    assert!(weights == again, "two runs of one seed differ");
}
