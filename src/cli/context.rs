//! What every subcommand needs: the common options, the GPU, progress and Ctrl-C.

use std::io::{IsTerminal, Write};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use tracing_subscriber::EnvFilter;

use crate::gpu::{Gpu, GpuOptions, Replay, Tuning, TuningSpent};
use crate::tensor::DType;
use crate::train::config::Precision;
use crate::{Error, Result};

/// The name of standard output in messages.
pub(super) const STANDARD_OUTPUT: &str = "standard output";

/// Kernels that `--profile` prints.
const PROFILE_LINES: usize = 30;

/// Options that every command takes.
#[derive(Clone, Debug, Default, Args)]
pub struct Common {
    /// Adapter by its number in `devices` or by a part of its name [default: the strongest]
    #[arg(
        long,
        global = true,
        value_name = "INDEX|NAME",
        help_heading = "Common options"
    )]
    pub adapter: Option<String>,
    /// Type of the activations [default: f32, or the configuration's]
    #[arg(long, global = true, value_enum, help_heading = "Common options")]
    pub precision: Option<Precision>,
    /// Seed of everything random [default: 0, or the configuration's]
    #[arg(long, global = true, value_name = "N", help_heading = "Common options")]
    pub seed: Option<u64>,
    /// Most GPU memory to hold: 4GiB, 4GB, 800MB, or a number of MiB [default: no limit]
    #[arg(
        long,
        global = true,
        value_name = "SIZE",
        alias = "memory-limit",
        help_heading = "Common options"
    )]
    pub max_memory: Option<Bytes>,
    /// Kernels that were measured to be the fastest here: not taken, those kept, or also measured at first use
    /// [default: first-use on a GPU, cached on a driver that runs on the CPU]
    #[arg(long, global = true, value_enum, help_heading = "Common options")]
    pub tuning: Option<Tuning>,
    /// Whether U-Net passes and training steps are recorded at their first run and replayed: less work for the CPU,
    /// more GPU memory [default: on for a GPU, off for a driver that runs on the CPU]
    #[arg(long, global = true, value_enum, help_heading = "Common options")]
    pub replay: Option<Replay>,
    /// Time every kernel on the device and print the sums at the end
    #[arg(long, global = true, help_heading = "Common options")]
    pub profile: bool,
    /// Print results and errors only
    #[arg(long, short, global = true, help_heading = "Common options")]
    pub quiet: bool,
}

/// A size of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let text = text.trim();
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let scale = match text[digits.len()..].trim().to_lowercase().as_str() {
            "" | "mib" | "m" => 1 << 20,
            "mb" => 1_000_000,
            "gib" | "g" => 1 << 30,
            "gb" => 1_000_000_000,
            _ => 0,
        };
        let plain = digits.chars().all(|c| c.is_ascii_digit() || c == '.');
        let number = digits.parse().ok().filter(|_| plain);
        let bytes = number.map(|number: f64| number * scale as f64);
        match bytes {
            Some(bytes) if scale > 0 && (0.0..1e18).contains(&bytes) => Ok(Self(bytes as u64)),
            _ => Err("expected a size such as 4GiB, 4GB, 800MB or 4096 (MiB)".into()),
        }
    }
}

/// The common options at work; made once per program run.
pub struct Context {
    /// The options as given.
    pub common: Common,
    /// Set by Ctrl-C.
    pub interrupt: Interrupt,
    gpu: OnceLock<Gpu>,
}

impl Context {
    /// Installs the Ctrl-C handler.
    pub(super) fn new(common: Common) -> Result<Self> {
        let interrupt = Interrupt::default();
        interrupt.install()?;
        Ok(Self {
            common,
            interrupt,
            gpu: OnceLock::new(),
        })
    }

    /// How the GPU is opened.
    pub(super) fn gpu_options(&self) -> GpuOptions {
        GpuOptions {
            adapter: self.common.adapter.clone(),
            max_bytes: self.common.max_memory.map(|Bytes(bytes)| bytes),
            profile: self.common.profile,
            tuning: self.common.tuning.unwrap_or(Tuning::ByAdapter),
            replay: self.common.replay.unwrap_or(Replay::ByAdapter),
            ..GpuOptions::default()
        }
    }

    /// The GPU that `--adapter` asks for, opened at the first call; its tier is logged in one line.
    pub fn gpu(&self) -> Result<&Gpu> {
        if let Some(gpu) = self.gpu.get() {
            return Ok(gpu);
        }
        let gpu = Gpu::new(&self.gpu_options())?;
        self.say(gpu.tier());
        if let Some(path) = gpu.tuning_anew() {
            self.say(format_args!(
                "new adapter: the fastest kernel for each size of product, convolution and attention is measured when it is first met, and kept in {}",
                path.display()
            ));
        }
        Ok(self.gpu.get_or_init(|| gpu))
    }

    /// Prints where the device's time went, with `--profile`.
    pub(super) fn print_profile(&self) {
        let Some(gpu) = self.gpu.get().filter(|_| self.common.profile) else {
            return;
        };
        let times = gpu.profile();
        if times.is_empty() {
            eprintln!("no profile: this adapter has no timestamps");
        }
        let total: f64 = times.iter().map(|t| t.millis).sum();
        for time in times.iter().take(PROFILE_LINES) {
            eprintln!(
                "{:10.1} ms {:5.1} % {:8} × {}",
                time.millis,
                100.0 * time.millis / total.max(1e-9),
                time.count,
                time.op
            );
        }
    }

    /// Tells what measuring kernels has taken, where some were.
    pub(super) fn print_tuning(&self) {
        let Some(gpu) = self.gpu.get() else {
            return;
        };
        let TuningSpent {
            classes,
            failed,
            time,
        } = gpu.tuning_spent();
        if classes + failed > 0 {
            let without = match failed {
                0 => String::new(),
                failed => format!("; {failed} could not be"),
            };
            self.say(format_args!(
                "kernels for {classes} sizes were measured, in {:.1} s{without}; later runs take them",
                time.as_secs_f64()
            ));
        }
    }

    /// `--precision`, else `configured`, as a tensor type of this adapter.
    pub fn activations(&self, configured: Precision) -> Result<DType> {
        self.common
            .precision
            .unwrap_or(configured)
            .dtype(self.gpu()?.tier())
    }

    /// `--seed`, else `configured`.
    pub fn seed(&self, configured: u64) -> u64 {
        self.common.seed.unwrap_or(configured)
    }

    /// Tells something on the way (standard error; not under `--quiet`).
    pub fn say(&self, message: impl std::fmt::Display) {
        if !self.common.quiet {
            eprintln!("{message}");
        }
    }

    /// Prints a line of the result on standard output. Errors: standard output cannot be written.
    pub fn print(&self, line: impl std::fmt::Display) -> Result<()> {
        writeln!(std::io::stdout().lock(), "{line}").map_err(|e| Error::io(STANDARD_OUTPUT, e))
    }

    /// A progress bar of `total` steps.
    pub fn progress(&self, what: &str, total: usize) -> Progress {
        Progress::new(what, total, self.common.quiet)
    }
}

/// Ctrl-C: the first asks the running command to stop after its step, the second ends the program at once.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    presses: Arc<AtomicUsize>,
    /// Whether the terminal is taken by [`super::tui`].
    screen: Arc<AtomicBool>,
}

impl Interrupt {
    fn install(&self) -> Result<()> {
        let interrupt = self.clone();
        ctrlc::set_handler(move || interrupt.press())
            .map_err(|e| Error::Input(format!("cannot listen for Ctrl-C: {e}")))
    }

    /// What a press of Ctrl-C does.
    pub(super) fn press(&self) {
        let screen = self.screen.load(Ordering::SeqCst);
        if self.presses.fetch_add(1, Ordering::SeqCst) > 0 {
            if screen {
                ratatui::restore();
            }
            std::process::exit(130);
        }
        if !screen {
            eprintln!("\nstopping after this step; press Ctrl-C again to stop at once");
        }
    }

    /// Says whether the terminal is taken.
    pub(super) fn screen(&self, taken: bool) {
        self.screen.store(taken, Ordering::SeqCst);
    }

    /// Whether Ctrl-C was pressed.
    pub fn requested(&self) -> bool {
        self.presses.load(Ordering::SeqCst) > 0
    }

    /// [`Error::Interrupted`] once Ctrl-C was pressed; called between steps.
    pub fn check(&self) -> Result<()> {
        if self.requested() {
            Err(Error::Interrupted)
        } else {
            Ok(())
        }
    }
}

/// Progress on standard error: a bar on a terminal, a line every ten seconds elsewhere, nothing under `--quiet`.
pub struct Progress {
    bar: ProgressBar,
    what: String,
    /// When the last line was printed; `None` where a bar is drawn or nothing is to be shown.
    lines: Option<Instant>,
}

/// Time between two lines where there is no terminal.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

impl Progress {
    fn new(what: &str, total: usize, quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if quiet || !terminal {
            ProgressBar::hidden()
        } else {
            ProgressBar::new(0)
        };
        bar.set_length(total as u64);
        let style = ProgressStyle::with_template(
            "{prefix} {bar:30} {pos}/{len} {msg} ({elapsed}, {eta} left)",
        );
        if let Ok(style) = style {
            bar.set_style(style);
        }
        bar.set_prefix(what.to_owned());
        Self {
            bar,
            what: what.to_owned(),
            lines: (!quiet && !terminal).then(Instant::now),
        }
    }

    /// One step done; `message` stands beside the bar (the loss, the sample's id).
    pub fn step(&mut self, message: impl Into<String>) {
        let message = message.into();
        self.bar.inc(1);
        let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
        if let Some(last) = &mut self.lines
            && (last.elapsed() >= BETWEEN_LINES || done == total)
        {
            eprintln!("{}: {done}/{total} {message}", self.what);
            *last = Instant::now();
        }
        self.bar.set_message(message);
    }

    /// Counts steps that an earlier run had done.
    pub fn skip(&self, steps: usize) {
        self.bar.inc(steps as u64);
        // They say nothing of how long the rest takes.
        self.bar.reset_eta();
    }

    /// Prints a line without tearing the bar.
    pub fn say(&self, message: impl std::fmt::Display) {
        if self.lines.is_some() {
            eprintln!("{message}");
        } else {
            self.bar.println(message.to_string());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Logs go to standard error; `LAVENDER_LOG=debug` (or any filter of `tracing`) shows more than warnings.
pub(super) fn start_logging(common: &Common) {
    let default = if common.quiet { "error" } else { "warn" };
    let filter =
        EnvFilter::try_from_env("LAVENDER_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    // Fails only if a subscriber is set already.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| super::tui::LogWriter)
        .with_target(false)
        .without_time()
        .try_init();
}

#[cfg(test)]
mod tests {
    use super::Bytes;

    #[test]
    fn sizes_are_read_with_their_unit() {
        for (text, bytes) in [
            ("4096", 4 << 30),
            ("0", 0),
            ("4GiB", 4 << 30),
            ("4 gb", 4_000_000_000),
            ("1.5G", 3 << 29),
            ("800MB", 800_000_000),
            ("800MiB", 800 << 20),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in [
            "",
            "GiB",
            "4KB",
            "-4GB",
            "4GiBs",
            "4,5GB",
            "1e3GB",
            "99999999999GB",
        ] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }
}
