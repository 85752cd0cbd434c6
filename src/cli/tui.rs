//! `train --tui`: live curves. What is shown ([`Dashboard`]) knows nothing of the terminal ([`Screen`]).

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ratatui::backend::Backend;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Block, Chart, Dataset, Gauge, GraphType, Paragraph};
use ratatui::{DefaultTerminal, Frame};

use super::context::STANDARD_OUTPUT;
use super::{Context, Interrupt};
use crate::train::metrics::{EvalMetrics, StepMetrics};
use crate::train::recipe::Observer;
use crate::train::report::{duration, number};
use crate::{Error, Result};

/// Time between two drawings.
const REFRESH: Duration = Duration::from_millis(250);

/// Notes that are kept.
const NOTES: usize = 50;

/// Steps whose mean time tells how long the rest takes.
const TIMED: usize = 20;

/// Least width of a chart in columns, and least height in lines.
const CHART: (u16, u16) = (38, 8);

/// Lines of the panel of figures, and of that of notes, with their borders.
const PANELS: (u16, u16) = (5, 7);

/// What is shown.
pub struct Dashboard {
    /// What runs: the run's directory and the adapter.
    title: String,
    total: u64,
    steps: Vec<StepMetrics>,
    /// How many of them an earlier start of the program did.
    earlier: usize,
    evaluations: Vec<EvalMetrics>,
    notes: VecDeque<String>,
    started: Instant,
    stopping: bool,
}

type Value = fn(&StepMetrics) -> f64;
type Evaluated = fn(&EvalMetrics) -> f64;

/// The charts in their order; a small terminal shows the first of them.
const CHARTS: [(&str, Value, Option<Evaluated>); 6] = [
    ("loss", |m| m.loss, Some(|e| e.loss)),
    ("language loss", |m| m.lm_loss, Some(|e| e.lm_loss)),
    ("attention loss", |m| m.attn_loss, Some(|e| e.attn_loss)),
    ("learning rate", |m| m.lr, None),
    ("tokens/s", speed, None),
    ("gradient norm", |m| m.grad_norm, None),
];

impl Dashboard {
    /// A run of `total` steps that goes on after `steps` and `evaluations`.
    pub fn new(
        title: String,
        total: u64,
        steps: Vec<StepMetrics>,
        evaluations: Vec<EvalMetrics>,
    ) -> Self {
        Self {
            title,
            total,
            earlier: steps.len(),
            steps,
            evaluations,
            notes: VecDeque::new(),
            started: Instant::now(),
            stopping: false,
        }
    }

    /// Adds a step.
    pub fn step(&mut self, metrics: &StepMetrics) {
        self.steps.push(metrics.clone());
    }

    /// Adds an evaluation.
    pub fn evaluated(&mut self, metrics: &EvalMetrics) {
        self.evaluations.push(metrics.clone());
    }

    /// Adds a note, one line or several.
    pub fn note(&mut self, text: &str) {
        for line in text.lines() {
            self.notes.push_back(line.to_owned());
        }
        let old = self.notes.len().saturating_sub(NOTES);
        self.notes.drain(..old);
    }

    /// Says that the run stops after this step.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// Draws all of it, as much as there is room for.
    pub fn draw(&self, frame: &mut Frame<'_>) {
        let height = frame.area().height;
        let figures = if height >= 16 { PANELS.0 } else { 0 };
        let notes = if height >= 26 { PANELS.1 } else { 0 };
        let [title, progress, charts, below, last, foot] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Length(1),
            Constraint::Fill(1),
            Constraint::Length(figures),
            Constraint::Length(notes),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        let name = Span::from(" lavender-wgpu ").bold().reversed();
        frame.render_widget(
            Line::from(vec![name, " ".into(), self.title.as_str().into()]),
            title,
        );
        self.draw_progress(frame, progress);
        self.draw_charts(frame, charts);
        if figures > 0 {
            self.draw_figures(frame, below);
        }
        if notes > 0 {
            self.draw_notes(frame, last);
        }
        let keys = match self.stopping {
            true => " stopping after this step, then saving; Ctrl-C again stops at once".yellow(),
            false => " q or Ctrl-C: finish the step, save and stop".dim(),
        };
        frame.render_widget(Line::from(keys), foot);
    }

    fn draw_progress(&self, frame: &mut Frame<'_>, area: Rect) {
        let done = self.steps.len() as u64;
        let ratio = done as f64 / self.total.max(1) as f64;
        let mut label = format!(
            "step {done} of {}, {}",
            self.total,
            duration(self.started.elapsed().as_secs_f64())
        );
        if let Some(left) = self.left() {
            label += &format!(", {} left", duration(left));
        }
        let gauge = Gauge::default()
            .ratio(ratio.clamp(0.0, 1.0))
            .label(label)
            .gauge_style(Style::new().fg(Color::Magenta).bg(Color::Black))
            .use_unicode(true);
        frame.render_widget(gauge, area);
    }

    /// Seconds that the rest takes; none before a step is timed.
    fn left(&self) -> Option<f64> {
        // The first step compiles kernels.
        let own = self.steps.get(self.earlier + 1..)?;
        let timed = &own[own.len().saturating_sub(TIMED)..];
        let sum: f64 = timed.iter().map(|m| m.step_ms).sum();
        let each = (!timed.is_empty()).then(|| sum / timed.len() as f64)?;
        let left = self.total.saturating_sub(self.steps.len() as u64);
        Some(left as f64 * each * 1e-3)
    }

    fn draw_charts(&self, frame: &mut Frame<'_>, area: Rect) {
        let columns = (area.width / CHART.0).clamp(1, 3) as usize;
        let rows = (area.height / CHART.1).clamp(1, (CHARTS.len() / columns) as u16) as usize;
        let lines = Layout::vertical(vec![Constraint::Fill(1); rows]).split(area);
        let mut charts = CHARTS.iter();
        for line in lines.iter() {
            let cells = Layout::horizontal(vec![Constraint::Fill(1); columns]).split(*line);
            for (cell, (name, value, evaluated)) in cells.iter().zip(&mut charts) {
                self.draw_chart(frame, *cell, name, *value, *evaluated);
            }
        }
    }

    fn draw_chart(
        &self,
        frame: &mut Frame<'_>,
        area: Rect,
        name: &str,
        value: Value,
        evaluated: Option<Evaluated>,
    ) {
        let last = self.steps.last().map(value);
        let title = match last {
            Some(last) => format!(" {name} {} ", number(last)),
            None => format!(" {name} "),
        };
        let block = Block::bordered()
            .title(title)
            .border_style(Style::new().dim());
        let points = self.steps.iter().map(|m| (m.step as f64, value(m)));
        let points = joined(points.collect(), 2 * usize::from(area.width.max(1)));
        let dots = evaluated.into_iter().flat_map(|value| {
            let evaluations = self.evaluations.iter();
            evaluations.map(move |e| (e.step as f64, value(e)))
        });
        let dots: Vec<(f64, f64)> = dots.collect();
        let all = || {
            points
                .iter()
                .chain(&dots)
                .map(|p| p.1)
                .filter(|v| v.is_finite())
        };
        let low = all().fold(f64::INFINITY, f64::min);
        let high = all().fold(f64::NEG_INFINITY, f64::max);
        if low > high {
            frame.render_widget(block, area);
            return;
        }
        let room = (0.05 * (high - low)).max(0.02 * high.abs()).max(1e-12);
        let bounds = [low - room, high + room];
        let end = points.iter().chain(&dots).map(|p| p.0).fold(1.0, f64::max);
        let sets = vec![
            Dataset::default()
                .marker(Marker::Braille)
                .graph_type(GraphType::Line)
                .style(Style::new().fg(Color::Magenta))
                .data(&points),
            Dataset::default()
                .marker(Marker::Dot)
                .graph_type(GraphType::Scatter)
                .style(Style::new().fg(Color::Yellow))
                .data(&dots),
        ];
        let dim = Style::new().dim();
        let chart = Chart::new(sets)
            .block(block)
            .x_axis(
                Axis::default()
                    .bounds([0.0, end])
                    .style(dim)
                    .labels(["0".to_owned(), number(end)]),
            )
            .y_axis(
                Axis::default()
                    .bounds(bounds)
                    .style(dim)
                    .labels([number(low), number(high)]),
            );
        frame.render_widget(chart, area);
    }

    fn draw_figures(&self, frame: &mut Frame<'_>, area: Rect) {
        let block = Block::bordered()
            .title(" last step ")
            .border_style(Style::new().dim());
        let mut lines = Vec::new();
        if let Some(m) = self.steps.last() {
            let skipped = if m.skipped { ", update skipped" } else { "" };
            lines.push(format!(
                "epoch {}  loss {}  language {}  attention {}  {} words matched{skipped}",
                m.epoch,
                number(m.loss),
                number(m.lm_loss),
                number(m.attn_loss),
                m.matched_words
            ));
            lines.push(format!(
                "learning rate {}  gradient norm {}  {:.0} tokens/s  {:.0} ms, {:.0} of it for data  {} MiB",
                number(m.lr),
                number(m.grad_norm),
                speed(m),
                m.step_ms,
                m.data_ms,
                m.peak_bytes >> 20
            ));
        } else {
            lines.push("the first step compiles kernels".into());
        }
        if let Some(e) = self.evaluations.last() {
            let best = self.evaluations.iter().rev().find(|e| e.best).unwrap_or(e);
            lines.push(format!(
                "evaluation after {} steps: loss {}; the best {} after {}",
                e.step,
                number(e.loss),
                number(best.loss),
                best.step
            ));
        }
        let lines: Vec<Line<'_>> = lines.into_iter().map(Line::from).collect();
        frame.render_widget(Paragraph::new(lines).block(block), area);
    }

    fn draw_notes(&self, frame: &mut Frame<'_>, area: Rect) {
        let block = Block::bordered()
            .title(" notes ")
            .border_style(Style::new().dim());
        let room = usize::from(area.height.saturating_sub(2));
        let last = self
            .notes
            .iter()
            .skip(self.notes.len().saturating_sub(room));
        let lines: Vec<Line<'_>> = last.map(|note| Line::from(note.as_str())).collect();
        frame.render_widget(Paragraph::new(lines).block(block), area);
    }
}

fn speed(m: &StepMetrics) -> f64 {
    m.tokens as f64 / (m.step_ms * 1e-3).max(1e-6)
}

/// Means of neighbours, so that at most `most` points are left.
fn joined(points: Vec<(f64, f64)>, most: usize) -> Vec<(f64, f64)> {
    if points.len() <= most {
        return points;
    }
    let parts = points.chunks(points.len().div_ceil(most.max(1)));
    let means = parts.map(|part| {
        let count = part.len() as f64;
        let sum = part
            .iter()
            .fold((0.0, 0.0), |sum, p| (sum.0 + p.0, sum.1 + p.1));
        (sum.0 / count, sum.1 / count)
    });
    means.collect()
}

/// What a key asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// To stop after the step.
    Stop,
    /// The same, and at once when it is pressed again.
    Interrupt,
}

/// What `key` asks for; none for most keys.
pub fn asked(key: &KeyEvent) -> Option<Asked> {
    match key.code {
        _ if key.kind != KeyEventKind::Press => None,
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => {
            Some(Asked::Interrupt)
        }
        KeyCode::Char('q' | 'Q') => Some(Asked::Stop),
        _ => None,
    }
}

/// Refuses `--tui` where there is no terminal to draw on.
///
/// # Errors
/// Standard output is a file or a pipe.
pub fn check() -> Result<()> {
    match io::stdout().is_terminal() {
        true => Ok(()),
        false => Err(Error::Input(
            "--tui: standard output is no terminal; leave --tui out, and look at the run by `lavender-wgpu report`"
                .into(),
        )),
    }
}

/// The terminal, drawn by a thread of its own; what it was is put back when this is dropped.
pub struct Screen {
    shown: Arc<Mutex<Dashboard>>,
    ended: Arc<AtomicBool>,
    drawing: Option<JoinHandle<()>>,
    interrupt: Interrupt,
    quiet: bool,
}

impl Screen {
    /// Takes the terminal over.
    ///
    /// # Errors
    /// None there, or one that refuses.
    pub fn open(dashboard: Dashboard, context: &Context) -> Result<Self> {
        check()?;
        let interrupt = context.interrupt.clone();
        // Also restores the terminal when a thread panics, before the message is printed.
        let terminal = ratatui::try_init().map_err(|e| {
            ratatui::restore();
            Error::io(STANDARD_OUTPUT, e)
        })?;
        interrupt.screen(true);
        *lock(&HELD) = Some(String::new());
        let (shown, ended) = (
            Arc::new(Mutex::new(dashboard)),
            Arc::new(AtomicBool::new(false)),
        );
        let (mine, over, asked) = (shown.clone(), ended.clone(), interrupt.clone());
        let drawing = std::thread::spawn(move || {
            if let Err(error) = show(terminal, &mine, &over, &asked) {
                // A terminal that is gone is no reason to stop training; Ctrl-C works as without a screen.
                ratatui::restore();
                asked.screen(false);
                lock(&mine).note(&format!("--tui: {error}"));
            }
        });
        Ok(Self {
            shown,
            ended,
            drawing: Some(drawing),
            interrupt,
            quiet: context.common.quiet,
        })
    }
}

fn show(
    mut terminal: DefaultTerminal,
    shown: &Mutex<Dashboard>,
    ended: &AtomicBool,
    interrupt: &Interrupt,
) -> io::Result<()> {
    // `Terminal::clear` would ask where the cursor is, which not every terminal answers.
    terminal.backend_mut().clear()?;
    while !ended.load(Ordering::SeqCst) {
        {
            let mut shown = lock(shown);
            let held = lock(&HELD).as_mut().map(std::mem::take);
            shown.note(&held.unwrap_or_default());
            if interrupt.requested() {
                shown.stop();
            }
            terminal.draw(|frame| shown.draw(frame))?;
        }
        if event::poll(REFRESH)?
            && let Event::Key(key) = event::read()?
        {
            match asked(&key) {
                Some(Asked::Stop) if interrupt.requested() => {}
                Some(_) => interrupt.press(),
                None => {}
            }
        }
    }
    Ok(())
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        if let Some(drawing) = self.drawing.take() {
            // A panic there has been printed.
            let _ = drawing.join();
        }
        ratatui::restore();
        self.interrupt.screen(false);
        let mut shown = lock(&self.shown);
        shown.note(&lock(&HELD).take().unwrap_or_default());
        for note in shown.notes.iter().filter(|_| !self.quiet) {
            eprintln!("{note}");
        }
    }
}

impl Observer for Screen {
    fn step(&mut self, metrics: &StepMetrics, _: u64) {
        lock(&self.shown).step(metrics);
    }

    fn interrupted(&self) -> bool {
        self.interrupt.requested()
    }

    fn evaluated(&mut self, metrics: &EvalMetrics) {
        lock(&self.shown).evaluated(metrics);
    }

    fn note(&mut self, message: &str) {
        lock(&self.shown).note(message);
    }
}

/// What is logged while the screen is drawn; it becomes notes.
static HELD: Mutex<Option<String>> = Mutex::new(None);

/// Where logs go: standard error, or the screen's notes.
pub(super) struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match lock(&HELD).as_mut() {
            Some(held) => held.push_str(&String::from_utf8_lossy(bytes)),
            None => return io::stderr().write(bytes),
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// A lock that survives a panic of the other thread: what it guards is whole after every statement.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}
