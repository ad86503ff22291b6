//! Log lines that a guest can provoke, but not without end.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lets a few events through per period and counts the rest.
#[derive(Debug)]
pub(crate) struct RateLimit {
    burst: u32,
    period: Duration,
    state: Mutex<Window>,
}

#[derive(Debug)]
struct Window {
    start: Option<Instant>,
    used: u32,
    dropped: u64,
}

impl RateLimit {
    /// At most `burst` events in each `period`.
    pub(crate) const fn new(burst: u32, period: Duration) -> Self {
        Self { burst, period, state: Mutex::new(Window { start: None, used: 0, dropped: 0 }) }
    }

    /// `Some(n)` if the event may be reported, n having been kept back before it.
    pub(crate) fn admit(&self) -> Option<u64> {
        let mut window = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let now = Instant::now();
        if window.start.is_none_or(|start| now.duration_since(start) >= self.period) {
            window.start = Some(now);
            window.used = 0;
        }
        if window.used >= self.burst {
            window.dropped += 1;
            return None;
        }
        window.used += 1;
        Some(std::mem::take(&mut window.dropped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_burst_passes_and_the_rest_is_counted() {
        let limit = RateLimit::new(2, Duration::from_millis(20));
        assert_eq!((limit.admit(), limit.admit(), limit.admit()), (Some(0), Some(0), None));
        std::thread::sleep(Duration::from_millis(25));
        assert_eq!(limit.admit(), Some(1));
    }
}
