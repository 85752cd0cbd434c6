//! Losses of expected answers against transformers, and figures of word maps against the drawn scenes' own.

use lavender_wgpu::data::scenes::{SceneSet, Split};
use lavender_wgpu::data::{ImageRef, Sample};
use lavender_wgpu::eval::item::{Item, drawn};
use lavender_wgpu::eval::predictions::Predictions;
use lavender_wgpu::eval::run::{Options, evaluate};
use lavender_wgpu::eval::{Benchmark, metrics};
use lavender_wgpu::nn::LoadOptions;
use lavender_wgpu::vlm::Student;
use serde_json::Value;

use crate::support::{gpu, reference};

fn figures(
    student: &Student,
    items: &[Item],
    benchmark: Benchmark,
    batch: usize,
) -> Vec<(String, f64)> {
    let (mut predictions, mut skipped) = (Predictions::in_memory(), Vec::new());
    let options = Options {
        benchmark,
        max_tokens: 8,
        batch,
    };
    let items: Vec<&Item> = items.iter().collect();
    let mut count = 0;
    let mut on_sample = |_| {
        count += 1;
        Ok(())
    };
    evaluate(
        student,
        &items,
        options,
        &mut predictions,
        &mut skipped,
        &mut on_sample,
    )
    .unwrap();
    assert_eq!(
        (count, predictions.lines().len(), skipped.len()),
        (items.len(), items.len(), 0)
    );
    let metrics = metrics(predictions.lines().iter().map(|line| &line.score));
    metrics
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

fn mini() -> Student {
    let dir = tempfile::tempdir().unwrap();
    let model = lavender_wgpu::embedded::unpack("student", dir.path()).unwrap();
    Student::open(model, gpu(), LoadOptions::default()).unwrap()
}

#[test]
fn caption_loss_is_transformers_over_a_batch_and_one_by_one() {
    for name in ["a", "b"] {
        let dir = reference(&format!("smolvlm/{name}"));
        let text = std::fs::read_to_string(dir.join("expected.json")).unwrap();
        let json: Value = serde_json::from_str(&text).unwrap();
        let wanted = json["batch"]["loss"].as_f64().unwrap();
        let picked = json["batch"]["cases"].as_array().unwrap();
        let item = |label: &Value| {
            let mut cases = json["cases"].as_array().unwrap().iter();
            let case = cases.find(|case| &case["name"] == label).unwrap();
            let text = |key: &str| case[key].as_str().unwrap();
            let image = case["images"][0].as_str().unwrap();
            let image = ImageRef::Path(reference(&format!("mllama/images/{image}.png")));
            Item::from_sample(
                &Sample::question("x", image, text("question"), text("answer")),
                0,
            )
        };
        let items: Vec<Item> = picked.iter().map(item).collect();
        let student = Student::open(dir, gpu(), LoadOptions::default()).unwrap();
        for batch in [2, 1] {
            let figures = figures(&student, &items, Benchmark::Caption, batch);
            let (name, loss) = &figures[0];
            assert_eq!(name, "loss");
            // f32 sums in another order.
            assert!((loss - wanted).abs() < 1e-4 * wanted, "{loss}, {wanted}");
            assert!((figures[1].1 - wanted.exp()).abs() < 1e-3 * wanted.exp());
        }
    }
}

#[test]
fn attention_and_answers_on_drawn_scenes_are_those_that_training_reports() {
    let student = mini();
    let scenes: Vec<_> = SceneSet::new(20, Split::HeldOut, 6).iter().collect();
    let known = lavender_wgpu::eval::drawn::figures(gpu(), &student, &scenes, || ()).unwrap();
    let captions = drawn(Some(Benchmark::Attention)).unwrap();
    let maps = figures(&student, &captions[..6], Benchmark::Attention, 3);
    let value = |name: &str| maps.iter().find(|(n, _)| n == name).unwrap().1;
    assert!((value("entropy") - known.attention_entropy).abs() < 1e-4);
    assert_eq!(value("pointing"), known.pointing);
    // Cells half covered against the area covered.
    assert!((value("chance") - known.chance).abs() < 0.02);
    assert!(value("iou") > value("chance") && value("iou") < 1.0);
    // A reply is exact where every token of the answer is the likeliest, the end of turn included.
    let questions: usize = scenes.iter().map(|scene| scene.questions.len()).sum();
    let asked = drawn(None).unwrap();
    let vqa = figures(&student, &asked[..questions], Benchmark::Vqa, 1);
    assert_eq!(vqa[0].0, "exact");
    assert!(
        (vqa[0].1 - known.answer_accuracy).abs() < 1e-9,
        "{vqa:?} {known:?}"
    );
}
