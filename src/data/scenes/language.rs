//! What is said of a scene.

use super::{Colour, Dice, Object, Shape};

/// A caption, and its shape and colour words in order, each with the number of its object.
pub(super) fn caption(dice: &mut Dice, objects: &[Object]) -> (String, Vec<(&'static str, usize)>) {
    let numbers: Vec<usize> = (0..objects.len()).collect();
    let mut order = dice.shuffled(&numbers);
    if order.len() > 1 && dice.unit() < 0.2 {
        order.pop();
    }
    let mut parts = Vec::new();
    let mut words = Vec::new();
    for number in order {
        let (shape, colour) = (objects[number].shape.word(), objects[number].colour.word());
        match dice.unit() {
            u if u < 0.4 => {
                parts.push(format!("a {colour} {shape}"));
                words.extend([(colour, number), (shape, number)]);
            }
            u if u < 0.7 => {
                parts.push(format!("a {shape}"));
                words.push((shape, number));
            }
            u => {
                parts.push(if u < 0.85 {
                    format!("something {colour}")
                } else {
                    format!("a {colour} shape")
                });
                words.push((colour, number));
            }
        }
    }
    let caption = match parts.as_slice() {
        [a, b] => {
            let join = ["and", "next to", "with"][dice.below(3)];
            format!("{a} {join} {b}")
        }
        [a, b, c] => format!("{a}, {b} and {c}"),
        _ => parts.concat(),
    };
    (caption, words)
}

/// Questions about every object, about how many there are and about what is there, in a random order.
pub(super) fn questions(dice: &mut Dice, objects: &[Object]) -> Vec<(String, String)> {
    let mut questions = Vec::new();
    for object in objects {
        let (shape, colour) = (object.shape.word(), object.colour.word());
        questions.push((format!("what colour is the {shape}?"), colour));
        questions.push((format!("what shape is {colour}?"), shape));
    }
    let number = ["one", "two", "three"][objects.len() - 1];
    questions.push(("how many shapes are there?".to_owned(), number));
    let yes_no = |yes: bool| if yes { "yes" } else { "no" };
    let shape = Shape::ALL[dice.below(Shape::ALL.len())];
    let is_there = objects.iter().any(|object| object.shape == shape);
    questions.push((format!("is there a {}?", shape.word()), yes_no(is_there)));
    let colour = Colour::ALL[dice.below(Colour::ALL.len())];
    let is_there = objects.iter().any(|object| object.colour == colour);
    questions.push((format!("is anything {}?", colour.word()), yes_no(is_there)));
    let numbers: Vec<usize> = (0..questions.len()).collect();
    let order = dice.shuffled(&numbers);
    order
        .into_iter()
        .map(|i| (questions[i].0.clone(), questions[i].1.to_owned()))
        .collect()
}
