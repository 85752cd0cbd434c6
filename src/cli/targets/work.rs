//! The work of `targets`: images are decoded ahead of the GPU and maps written behind it, each on a thread of its own.

use std::collections::BTreeMap;
use std::io::{ErrorKind, IsTerminal};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use image::RgbImage;
use rayon::prelude::*;

use super::{Args, Context, Previews};
use crate::align::store::failures::Cause;
use crate::align::store::{Batch, Outcome, TargetWriter};
use crate::align::targets::{Item, TargetMaker, WordMaps, fitted};
use crate::align::words::{Case, words};
use crate::data::Sample;
use crate::{Error, Result};

/// Batches that wait for the GPU, and for the disk.
const AHEAD: usize = 2;

/// Ids that the summary names for each cause of failure.
const NAMED: usize = 5;

/// What a run did.
#[derive(Debug)]
pub(super) struct Tally {
    /// Samples of this part of the data set.
    total: usize,
    /// Samples that are not in any batch: they are there already.
    skipped: usize,
    made: usize,
    words: usize,
    /// Ids by cause.
    failed: BTreeMap<Cause, Vec<String>>,
    /// The first failure's message.
    first: Option<String>,
    failures: PathBuf,
    start: Instant,
}

/// A sample before the GPU sees it.
struct Prepared<'a> {
    id: &'a str,
    text: String,
    /// As the model looks at it, or what became of the sample without the GPU.
    image: std::result::Result<RgbImage, Outcome>,
}

/// Makes the batches' samples (places in `samples`) and writes them.
///
/// # Errors
/// What stops the whole run: the disk, the GPU, Ctrl-C. Batches that were finished are on disk.
pub(super) fn run(
    maker: &TargetMaker,
    samples: &[&Sample],
    batches: Vec<Batch>,
    writer: &mut TargetWriter,
    previews: Previews,
    context: &Context,
) -> Result<Tally> {
    let planned: usize = batches.iter().map(|batch| batch.samples.len()).sum();
    let mut tally = Tally {
        total: samples.len(),
        skipped: samples.len() - planned,
        made: 0,
        words: 0,
        failed: BTreeMap::new(),
        first: None,
        failures: writer.failures_path(),
        start: Instant::now(),
    };
    let (side, case) = (maker.model.image_side(), maker.case);
    let (ready_in, ready) = sync_channel(AHEAD);
    let (done_in, done) = sync_channel(AHEAD);
    let result = std::thread::scope(|scope| {
        scope.spawn(move || prepare_all(samples, batches, side, case, ready_in));
        let writing = scope.spawn(|| write_all(writer, done));
        let making = make_all(maker, ready, done_in, previews, &mut tally, context);
        // Both ends of the channels are closed by now; the disk's error is the cause where both have one.
        let written = writing
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        written.and(making)
    });
    let kept = tally.skipped + tally.made;
    let result = result.and_then(|()| writer.finish());
    if matches!(result, Err(Error::Interrupted)) {
        context.say(format_args!(
            "stopped with {kept} of {} samples done; the same command goes on from there",
            samples.len()
        ));
    }
    result.map_err(|e| explained(e, kept)).map(|()| tally)
}

/// Decodes, crops and resizes the images of every batch, in order.
fn prepare_all<'a>(
    samples: &[&'a Sample],
    batches: Vec<Batch>,
    side: usize,
    case: Case,
    ready: SyncSender<(Batch, Vec<Prepared<'a>>)>,
) {
    for batch in batches {
        let prepared = batch
            .samples
            .par_iter()
            .map(|&place| prepare(samples[place], side, case))
            .collect();
        // Nobody listens once the run has stopped.
        if ready.send((batch, prepared)).is_err() {
            return;
        }
    }
}

fn prepare(sample: &Sample, side: usize, case: Case) -> Prepared<'_> {
    let text = sample.answer();
    let image = match words(&text, case).is_empty() {
        true => {
            let shown: String = text.chars().take(80).collect();
            let reason = format!("the text {shown:?} has no word, so there is nothing to map");
            Err(failed(Cause::Text, reason))
        }
        false => sample
            .image
            .open()
            .map(|image| fitted(&image, side))
            .map_err(|error| failed(Cause::Image, error.to_string())),
    };
    Prepared {
        id: &sample.id,
        text,
        image,
    }
}

fn failed(cause: Cause, reason: String) -> Outcome {
    Outcome::Failed { cause, reason }
}

/// Writes batches until there are no more, or one cannot be written.
fn write_all(writer: &mut TargetWriter, done: Receiver<(Batch, Vec<Outcome>)>) -> Result<()> {
    for (batch, outcomes) in done {
        writer.write(&batch, outcomes)?;
    }
    Ok(())
}

/// The GPU's side: every prepared batch becomes outcomes.
fn make_all(
    maker: &TargetMaker,
    ready: Receiver<(Batch, Vec<Prepared>)>,
    done: SyncSender<(Batch, Vec<Outcome>)>,
    mut previews: Previews,
    tally: &mut Tally,
    context: &Context,
) -> Result<()> {
    let mut progress = context.progress("targets", tally.total);
    progress.skip(tally.skipped);
    for (batch, prepared) in ready {
        context.interrupt.check()?;
        let items: Vec<Item> = prepared
            .iter()
            .filter_map(|sample| {
                Some(Item {
                    id: sample.id,
                    image: sample.image.as_ref().ok()?,
                    text: &sample.text,
                })
            })
            .collect();
        // One outcome an item, in their order.
        let made = make(maker, &items, &mut previews)?;
        if !tally.failed.contains_key(&Cause::Maps)
            && let Some(layer) = diagnosis(maker, &items, &made)?
        {
            progress.say(layer);
        }
        let mut made = made.into_iter();
        let mut outcomes = Vec::with_capacity(prepared.len());
        for sample in prepared {
            let Some(outcome) = sample.image.map_or_else(Some, |_| made.next()) else {
                continue;
            };
            tally.count(sample.id, &outcome);
            progress.step(tally.pace());
            outcomes.push(outcome);
        }
        if done.send((batch, outcomes)).is_err() {
            break;
        }
    }
    Ok(())
}

/// What becomes of items on the GPU; where one of several spoils their batch, each is made alone.
fn make(maker: &TargetMaker, items: &[Item], previews: &mut Previews) -> Result<Vec<Outcome>> {
    if items.is_empty() {
        return Ok(Vec::new());
    }
    // Ctrl-C waits for the batch, which may hold minutes of work.
    let error = match maker.make(items, |_| Ok(())) {
        Ok(made) => {
            if previews.left > 0 {
                previews.write(maker, items, &made)?;
            }
            return Ok(made.maps.into_iter().map(outcome).collect());
        }
        Err(error @ (Error::Input(_) | Error::NotFinite { .. })) => error,
        Err(error) => return Err(error),
    };
    if let [item] = items {
        let cause = match maker.model.tokenizer.chunks(item.text) {
            Ok(_) => Cause::Maps,
            Err(_) => Cause::Text,
        };
        return Ok(vec![failed(cause, error.to_string())]);
    }
    let each = items
        .iter()
        .map(|item| make(maker, std::slice::from_ref(item), previews));
    Ok(each.collect::<Result<Vec<_>>>()?.concat())
}

/// Says once a run which layer of the model gave the first value that is not finite.
fn diagnosis(maker: &TargetMaker, items: &[Item], made: &[Outcome]) -> Result<Option<String>> {
    let spoilt = items.iter().zip(made).find(|(_, outcome)| {
        matches!(
            outcome,
            Outcome::Failed {
                cause: Cause::Maps,
                ..
            }
        )
    });
    match spoilt {
        Some((item, _)) => {
            let found = maker.model.diagnose(item.image, item.text)?;
            Ok(found.map(|found| format!("`{}`: {found}", item.id)))
        }
        None => Ok(None),
    }
}

/// Whether a sample's maps are fit to be stored.
fn outcome(maps: WordMaps) -> Outcome {
    if maps.words.is_empty() {
        let reason = "no word of the text has a token of the teacher's";
        return failed(Cause::Text, reason.into());
    }
    if maps.maps.iter().any(|value| !value.is_finite()) {
        let reason = "the word maps are not finite; try `--precision f32`";
        return failed(Cause::Maps, reason.into());
    }
    Outcome::Made {
        words: maps.words,
        maps: maps.maps,
    }
}

impl Tally {
    fn count(&mut self, id: &str, outcome: &Outcome) {
        match outcome {
            Outcome::Made { words, .. } => {
                self.made += 1;
                self.words += words.len();
            }
            Outcome::Failed { cause, reason } => {
                self.first
                    .get_or_insert_with(|| format!("`{id}`: {reason}"));
                self.failed.entry(*cause).or_default().push(id.to_owned());
            }
        }
    }

    /// Whether any sample of the part has targets.
    pub(super) fn any(&self) -> bool {
        self.made + self.skipped > 0
    }

    fn failures(&self) -> usize {
        self.failed.values().map(Vec::len).sum()
    }

    fn seconds(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    /// Samples a second.
    fn rate(&self) -> f64 {
        (self.made + self.failures()) as f64 / self.seconds().max(1e-9)
    }

    /// What stands beside the progress: rate, time left, failures.
    fn pace(&self) -> String {
        let left = self.total - self.skipped - self.made - self.failures();
        let left = (left as f64 / self.rate().max(1e-9)) as u64;
        let failures = match self.failures() {
            0 => String::new(),
            failures => format!(", {failures} failed"),
        };
        // A bar shows the time left itself.
        let left = match std::io::stderr().is_terminal() {
            true => String::new(),
            false => format!(
                ", {}:{:02}:{:02} left",
                left / 3600,
                left / 60 % 60,
                left % 60
            ),
        };
        format!("{:.2}/s{left}{failures}", self.rate())
    }

    /// The summary, on standard output.
    pub(super) fn print(&self, args: &Args, context: &Context) -> Result<()> {
        context.print(format_args!(
            "{} samples, {} word maps in {:.1} s ({:.2} samples/s); {} samples were there already, {} failed: {}",
            self.made,
            self.words,
            self.seconds(),
            self.rate(),
            self.skipped,
            self.failures(),
            args.out.display()
        ))?;
        for (cause, ids) in &self.failed {
            let more = match ids.len() > NAMED {
                true => ", …",
                false => "",
            };
            context.print(format_args!(
                "failed: {} × {}: {}{more}",
                ids.len(),
                cause.describe(),
                ids[..ids.len().min(NAMED)].join(", ")
            ))?;
        }
        if !self.failed.is_empty() {
            context.print(format_args!("reasons: {}", self.failures.display()))?;
        }
        Ok(())
    }

    /// An error where not one sample of the part has targets.
    pub(super) fn check(&self) -> Result<()> {
        match &self.first {
            Some(first) if !self.any() => Err(Error::Input(format!(
                "none of the {} samples could be made; the first was {first}",
                self.total
            ))),
            _ => Ok(()),
        }
    }
}

/// An error that ends a run, with what is kept and how to go on.
pub(super) fn explained(error: Error, kept: usize) -> Error {
    let go_on = format!("{kept} samples are kept, and the same command goes on from there");
    match error {
        Error::Io { path, source }
            if matches!(
                source.kind(),
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge
            ) =>
        {
            Error::file(
                path,
                format!("{source}: the disk is full; make room, {go_on}"),
            )
        }
        Error::DeviceLost(reason) => Error::Gpu(format!("the device was lost ({reason}); {go_on}")),
        other => other,
    }
}
