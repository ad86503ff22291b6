//! What old PCs have, and kernels know that nobody has told of anything better: the 8259 interrupt controllers, the interval
//! timer, and the chip with the time of day, which does not interrupt.

use std::sync::Arc;

use mvm_devices::{
    Bus, BusError, EventLoop, IoApic, IsaLine, MsiSink, Pic, PicState, Pit, PitError, PitState,
    Rtc, RtcState,
};
use serde::{Deserialize, Serialize};

/// All of it.
#[derive(Debug)]
pub struct OldPc {
    /// The interrupt controllers.
    pub pic: Arc<Pic>,
    /// The interval timer.
    pub pit: Pit,
    /// The time of day.
    rtc: Arc<Rtc>,
}

/// What a guest can notice of it, as a snapshot has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OldPcState {
    pic: PicState,
    pit: PitState,
    rtc: RtcState,
}

impl OldPc {
    /// Where the I/O APIC has the timer's interrupt: input 0 was taken on PCs.
    const TIMER_PIN: u8 = 2;

    /// Makes it, with INTR going to `sink`, and places its ports, but for the timer's part of system control port B.
    ///
    /// # Errors
    /// The places are taken.
    pub fn place(sink: Arc<dyn MsiSink>, bus: &mut Bus) -> Result<Self, BusError> {
        let (pic, pit, rtc) = (Pic::new(sink), Pit::new(), Arc::new(Rtc::new()));
        pic.place(bus)?;
        bus.ports.insert("pit", Pit::PORT, Pit::LEN, Arc::new(pit.clone()))?;
        bus.ports.insert("rtc", Rtc::PORT, Rtc::LEN, rtc.clone())?;
        Ok(Self { pic, pit, rtc })
    }

    /// Wires the timer to the controllers of both kinds; it waits on `events`.
    ///
    /// # Errors
    /// The host has no timer.
    pub fn connect(&self, ioapic: &Arc<IoApic>, events: &EventLoop) -> Result<(), PitError> {
        let (Some(pic), Some(ioapic)) = (self.pic.pin(0), ioapic.pin(Self::TIMER_PIN)) else {
            return Ok(());
        };
        self.pit.connect(Arc::new(IsaLine { pic, ioapic }), events)
    }

    /// Where it stands.
    pub fn state(&self) -> OldPcState {
        OldPcState { pic: self.pic.state(), pit: self.pit.state(), rtc: self.rtc.state() }
    }

    /// Has the interrupt controllers go on from `state`: before anything interrupts.
    pub fn restore_controllers(&self, state: &OldPcState) {
        self.pic.restore(&state.pic);
    }

    /// Has the clocks go on from `state`.
    pub fn restore_clocks(&self, state: &OldPcState) {
        self.pit.restore(&state.pit);
        self.rtc.restore(&state.rtc);
    }
}
