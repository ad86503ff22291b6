//! The clocks of old PCs: the interval timer, and the chip with the time of day.
//!
//! Neither interrupts: there is no 8259 for them. A kernel that halts until the timer's interrupt comes waits in vain.

use std::sync::Arc;

use mvm_devices::{Bus, BusError, Pit, PitState, Rtc, RtcState};
use serde::{Deserialize, Serialize};

/// Both.
#[derive(Debug)]
pub struct Clocks {
    /// The interval timer.
    pub pit: Pit,
    /// The time of day.
    pub rtc: Arc<Rtc>,
}

/// What a guest can notice of them, as a snapshot has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClocksState {
    pit: PitState,
    rtc: RtcState,
}

impl Clocks {
    /// Makes them and places their ports, but for the timer's part of system control port B.
    ///
    /// # Errors
    /// The places are taken.
    pub fn place(bus: &mut Bus) -> Result<Self, BusError> {
        let (pit, rtc) = (Pit::new(), Arc::new(Rtc::new()));
        bus.ports.insert("pit", Pit::PORT, Pit::LEN, Arc::new(pit.clone()))?;
        bus.ports.insert("rtc", Rtc::PORT, Rtc::LEN, rtc.clone())?;
        Ok(Self { pit, rtc })
    }

    /// Where they stand.
    pub fn state(&self) -> ClocksState {
        ClocksState { pit: self.pit.state(), rtc: self.rtc.state() }
    }

    /// Go on from `state`.
    pub fn restore(&self, state: &ClocksState) {
        self.pit.restore(&state.pit);
        self.rtc.restore(&state.rtc);
    }
}
