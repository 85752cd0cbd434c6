//! Drawn scenes: the same everywhere, masks that fit the picture, splits that share no pair.

use std::collections::HashSet;

use lavender_wgpu::data::scenes::{
    Colour, DESCRIBE, HELD_OUT, SIDE, Scene, SceneSet, Shape, Split,
};

/// A pixel's distance from gray: shapes but the white ones are colourful, grounds are not.
fn colourfulness(scene: &Scene, x: usize, y: usize) -> i32 {
    let [r, g, b] = scene.image.get_pixel(x as u32, y as u32).0.map(i32::from);
    r.max(g).max(b) - r.min(g).min(b)
}

#[test]
fn a_scene_depends_on_seed_split_and_index_alone() {
    let set = SceneSet::new(7, Split::Train, 5);
    let forwards: Vec<Scene> = set.iter().collect();
    let again = SceneSet::new(7, Split::Train, 9).get(3);
    assert_eq!(forwards[3].image, again.image);
    assert_eq!(forwards[3].objects, again.objects);
    assert_eq!(forwards[3].caption, again.caption);
    assert_eq!(forwards[3].questions, again.questions);
    for other in [
        SceneSet::new(8, Split::Train, 9).get(3),
        SceneSet::new(7, Split::HeldOut, 9).get(3),
        forwards[2].clone(),
    ] {
        assert_ne!(other.image, again.image);
    }
}

#[test]
fn the_generator_has_not_moved() {
    // Committed weights and figures were made with these very scenes: a change of the generator is a change of data.
    let scene = Scene::new(0, Split::HeldOut, 0);
    let sum: u64 = scene
        .image
        .as_raw()
        .iter()
        .enumerate()
        .map(|(i, &v)| (i as u64 % 251 + 1) * u64::from(v))
        .sum();
    assert_eq!(
        (sum, scene.caption.as_str()),
        (170_840_240, "something yellow next to a purple shape")
    );
}

#[test]
fn held_out_pairs_are_never_trained_on_and_always_tested() {
    let mut seen = HashSet::new();
    for scene in SceneSet::new(1, Split::Train, 600).iter() {
        for object in &scene.objects {
            assert!(!object.is_held_out(), "{object:?} in a training scene");
            seen.insert((object.shape, object.colour));
        }
    }
    assert_eq!(
        seen.len(),
        Shape::ALL.len() * Colour::ALL.len() - HELD_OUT.len()
    );
    let mut held_out = HashSet::new();
    for scene in SceneSet::new(1, Split::HeldOut, 100).iter() {
        let pairs = scene.objects.iter().filter(|object| object.is_held_out());
        let before = held_out.len();
        held_out.extend(pairs.map(|object| (object.shape, object.colour)));
        assert!(!held_out.is_empty() && held_out.len() >= before);
        assert!(scene.objects.iter().any(|object| object.is_held_out()));
    }
    assert_eq!(held_out.len(), HELD_OUT.len());
}

#[test]
fn objects_differ_and_stay_inside() {
    for scene in SceneSet::new(2, Split::Train, 100).iter() {
        assert!((1..=3).contains(&scene.objects.len()));
        for (i, object) in scene.objects.iter().enumerate() {
            for at in object.centre {
                assert!(at - object.radius >= 0.0 && at + object.radius <= SIDE as f32);
            }
            for other in &scene.objects[i + 1..] {
                assert_ne!(object.shape, other.shape);
                assert_ne!(object.colour, other.colour);
            }
        }
    }
}

#[test]
fn masks_cover_what_is_drawn() {
    let mut area = 0.0;
    let mut count = 0;
    for scene in SceneSet::new(3, Split::Train, 60).iter() {
        for (object, mask) in scene.objects.iter().zip(scene.object_masks()) {
            area += mask.area();
            count += 1;
            assert!(mask.area() > 0.01, "{object:?} is hidden");
            for y in 0..SIDE {
                for x in 0..SIDE {
                    if mask.at(x, y) > 0.999 && object.colour != Colour::White {
                        let found = colourfulness(&scene, x, y);
                        assert!(found > 80, "{object:?} at ({x}, {y}): {found}");
                    }
                }
            }
        }
        for y in 0..SIDE {
            for x in 0..SIDE {
                let covered: f32 = scene.object_masks().iter().map(|mask| mask.at(x, y)).sum();
                assert!(covered <= 1.0 + 1e-5);
                if covered == 0.0 {
                    let found = colourfulness(&scene, x, y);
                    assert!(found < 80, "ground at ({x}, {y}): {found}");
                }
            }
        }
    }
    // Chance level of the pointing game.
    let mean = area / count as f32;
    assert!((0.04..0.12).contains(&mean), "mean mask area {mean}");
}

#[test]
fn captions_name_objects_by_shape_by_colour_and_by_both() {
    let (mut both, mut shape_alone, mut colour_alone) = (0, 0, 0);
    for scene in SceneSet::new(4, Split::HeldOut, 200).iter() {
        let words = scene.word_masks();
        assert!(!words.is_empty());
        for (word, _) in &words {
            assert_eq!(
                scene
                    .caption
                    .split([' ', ','])
                    .filter(|part| part == word)
                    .count(),
                1,
                "{word} in {:?}",
                scene.caption
            );
        }
        for (object, mask) in scene.objects.iter().zip(scene.object_masks()) {
            let named = |name: &str| {
                let found = words.iter().find(|(word, _)| word == name);
                assert!(found.is_none_or(|(_, region)| region == mask));
                found.is_some()
            };
            match (named(object.shape.word()), named(object.colour.word())) {
                (true, true) => both += 1,
                (true, false) => shape_alone += 1,
                (false, true) => colour_alone += 1,
                (false, false) => {}
            }
        }
    }
    assert!(both > 60 && shape_alone > 40 && colour_alone > 40);
}

#[test]
fn questions_are_answered_by_the_scene() {
    let mut answers = HashSet::new();
    for scene in SceneSet::new(5, Split::Train, 100).iter() {
        assert_eq!(scene.questions.len(), 2 * scene.objects.len() + 3);
        for (question, answer) in &scene.questions {
            answers.insert(answer.clone());
            let asked: Vec<&str> = question.trim_end_matches('?').split(' ').collect();
            let last = asked[asked.len() - 1];
            let expected = match asked[..2] {
                ["what", "colour"] => {
                    let object = scene.objects.iter().find(|o| o.shape.word() == last);
                    object.unwrap().colour.word()
                }
                ["what", "shape"] => {
                    let object = scene.objects.iter().find(|o| o.colour.word() == last);
                    object.unwrap().shape.word()
                }
                ["how", "many"] => ["one", "two", "three"][scene.objects.len() - 1],
                _ => {
                    let there = scene
                        .objects
                        .iter()
                        .any(|o| o.shape.word() == last || o.colour.word() == last);
                    if there { "yes" } else { "no" }
                }
            };
            assert_eq!(answer, expected, "{question}");
        }
    }
    assert_eq!(answers.len(), 4 + 6 + 3 + 2);
}

#[test]
fn pointing_hits_only_inside() {
    let scene = Scene::new(6, Split::Train, 0);
    let mask = &scene.object_masks()[0];
    let side = 32;
    let inside = mask.resized(side).inside();
    assert!(inside.contains(&true) && inside.contains(&false));
    for (i, &is_inside) in inside.iter().enumerate() {
        let mut map = vec![0.25; side * side];
        map[i] = 0.75;
        assert_eq!(mask.is_hit_by(&map), is_inside);
    }
}

#[test]
fn a_data_set_asks_for_captions_and_for_names() {
    let set = SceneSet::new(9, Split::Train, 8);
    let data = set.data_set().unwrap();
    assert_eq!(data.samples.len(), 16);
    for (number, scene) in set.iter().enumerate() {
        let [caption, question] = &data.samples[2 * number..2 * number + 2] else {
            panic!()
        };
        assert_eq!(caption.turns[0].text(), DESCRIBE);
        assert_eq!(caption.answer(), scene.caption);
        let asked = (question.turns[0].text(), question.answer());
        assert!(scene.questions.contains(&asked));
        assert_eq!(caption.image.open().unwrap(), scene.image);
    }
}
