//! Making numbered items ahead of their use, on worker threads, handed out in order.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

type Made<T> = Result<T, Box<dyn Any + Send>>;

/// Items `first`, `first + 1`, … made by threads and taken in that order, whichever thread is done first.
///
/// At most `ahead` items are finished or in the making beyond those taken. An item is made once, from its number alone,
/// so that what is taken does not depend on the threads; an item that is an error surfaces when its turn comes.
pub struct Prefetch<T> {
    shared: Arc<Shared<T>>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared<T> {
    make: Box<dyn Fn(u64) -> T + Send + Sync>,
    state: Mutex<State<T>>,
    changed: Condvar,
    ahead: u64,
    end: u64,
}

struct State<T> {
    /// The next item that no thread has begun.
    begun: u64,
    /// The next item to be taken.
    taken: u64,
    ready: BTreeMap<u64, Made<T>>,
    stopped: bool,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // No user code runs under the lock, so a poisoned one is still whole.
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State<T>>) -> MutexGuard<'a, State<T>> {
        self.changed.wait(state).unwrap_or_else(|e| e.into_inner())
    }

    /// A worker's life: begins the next item while there is room, until the end or until stopped.
    fn work(&self) {
        let mut state = self.lock();
        while !state.stopped && state.begun < self.end {
            if state.begun >= state.taken + self.ahead {
                state = self.wait(state);
                continue;
            }
            let number = state.begun;
            state.begun += 1;
            drop(state);
            let made = catch_unwind(AssertUnwindSafe(|| (self.make)(number)));
            state = self.lock();
            state.ready.insert(number, made);
            self.changed.notify_all();
        }
    }
}

impl<T: Send + 'static> Prefetch<T> {
    /// Items `items`, `make` of each on `workers` threads, up to `ahead` of them in advance (at least one).
    ///
    /// Without workers every item is made when it is taken. A thread that the system refuses is done without.
    pub fn new(
        items: std::ops::Range<u64>,
        workers: usize,
        ahead: usize,
        make: impl Fn(u64) -> T + Send + Sync + 'static,
    ) -> Self {
        let shared = Arc::new(Shared {
            make: Box::new(make),
            state: Mutex::new(State {
                begun: items.start,
                taken: items.start,
                ready: BTreeMap::new(),
                stopped: false,
            }),
            changed: Condvar::new(),
            ahead: ahead.max(1) as u64,
            end: items.end,
        });
        let start = |number| {
            let shared = shared.clone();
            std::thread::Builder::new()
                .name(format!("data-{number}"))
                .spawn(move || shared.work())
                .ok()
        };
        Self {
            workers: (0..workers).map_while(start).collect(),
            shared,
        }
    }

    /// The next item, waited for if it is not ready; `None` after the last. A panic of `make` comes out here.
    pub fn take(&mut self) -> Option<T> {
        let mut state = self.shared.lock();
        let number = state.taken;
        if number >= self.shared.end {
            return None;
        }
        let made = loop {
            if self.workers.is_empty() {
                state.begun = number + 1;
                break Ok((self.shared.make)(number));
            }
            match state.ready.remove(&number) {
                Some(made) => break made,
                None => state = self.shared.wait(state),
            }
        };
        state.taken = number + 1;
        drop(state);
        self.shared.changed.notify_all();
        Some(made.unwrap_or_else(|panic| resume_unwind(panic)))
    }
}

impl<T> Drop for Prefetch<T> {
    /// Waits for the items in the making; what is ready is thrown away.
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
        for worker in self.workers.drain(..) {
            // A panic of `make` was caught and is handed over by `take`.
            let _ = worker.join();
        }
    }
}
