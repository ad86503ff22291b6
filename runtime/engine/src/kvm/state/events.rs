//! What is pending, and whether the vCPU runs.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_X86_SHADOW_INT_MOV_SS,
    KVM_X86_SHADOW_INT_STI, kvm_vcpu_events,
};

use crate::{MpState, PendingEvents};

const RFLAGS_IF: u64 = 1 << 9;
/// NMIs that a processor can hold.
const NMIS_MAX: u8 = 2;

/// The events in our terms, and the vector of an interrupt that was accepted and not delivered: KVM holds
/// one between leaving the guest and entering it again, we do not. From whom it is the local APIC knows.
pub(super) fn events_from(e: &kvm_vcpu_events, mp_state: u32) -> (PendingEvents, Option<u8>) {
    let error = (e.exception.has_error_code != 0).then_some(e.exception.error_code);
    let exception = e.exception.injected | e.exception.pending != 0;
    let events = PendingEvents {
        exception: exception.then_some((e.exception.nr, error)),
        shadow: e.interrupt.shadow != 0,
        nmis_pending: e.nmi.pending.saturating_add(e.nmi.injected).min(NMIS_MAX),
        // One that is about to be delivered masks others only then.
        nmi_masked: e.nmi.masked != 0 && e.nmi.injected == 0,
        sipi: (mp_state == KVM_MP_STATE_SIPI_RECEIVED).then_some(e.sipi_vector as u8),
        external: None,
        unhalted: false,
    };
    // INT n is not accepted from anywhere: RIP is still at it.
    let accepted = (e.interrupt.injected != 0 && e.interrupt.soft == 0).then_some(e.interrupt.nr);
    (events, accepted)
}

pub(super) fn events_to(events: &PendingEvents, rflags: u64) -> kvm_vcpu_events {
    let mut e = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..kvm_vcpu_events::default()
    };
    if let Some((vector, code)) = events.exception {
        e.exception.injected = 1;
        e.exception.nr = vector;
        e.exception.has_error_code = code.is_some().into();
        e.exception.error_code = code.unwrap_or(0);
    }
    if events.shadow {
        // With interrupts off VT-x takes only the other kind (SDM vol. 3, 27.3.1.5).
        let kind = if rflags & RFLAGS_IF != 0 {
            KVM_X86_SHADOW_INT_STI
        } else {
            KVM_X86_SHADOW_INT_MOV_SS
        };
        e.interrupt.shadow = kind as u8;
    }
    if let Some(vector) = events.external {
        e.interrupt.injected = 1;
        e.interrupt.nr = vector;
    }
    e.nmi.pending = events.nmis_pending;
    e.nmi.masked = events.nmi_masked.into();
    if let Some(vector) = events.sipi {
        e.sipi_vector = vector.into();
        e.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
    }
    e
}

pub(super) fn mp_state_from(state: u32) -> MpState {
    match state {
        KVM_MP_STATE_HALTED => MpState::Halted,
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => {
            MpState::WaitForSipi
        }
        _ => MpState::Running,
    }
}

pub(super) fn mp_state_to(state: MpState, sipi: Option<u8>) -> u32 {
    match (state, sipi) {
        (MpState::Running, _) => KVM_MP_STATE_RUNNABLE,
        (MpState::Halted, _) => KVM_MP_STATE_HALTED,
        (MpState::WaitForSipi, Some(_)) => KVM_MP_STATE_SIPI_RECEIVED,
        // Not UNINITIALIZED, which waits for an INIT first.
        (MpState::WaitForSipi, None) => KVM_MP_STATE_INIT_RECEIVED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_both_ways() {
        let events = PendingEvents {
            exception: Some((14, Some(2))),
            shadow: true,
            nmis_pending: 2,
            nmi_masked: true,
            sipi: Some(0x9a),
            external: None,
            unhalted: false,
        };
        for rflags in [2, 0x202] {
            let mp = mp_state_to(MpState::WaitForSipi, events.sipi);
            assert_eq!(events_from(&events_to(&events, rflags), mp), (events, None));
        }
        let none = PendingEvents::default();
        assert_eq!(events_from(&events_to(&none, 2), KVM_MP_STATE_RUNNABLE), (none, None));
    }

    #[test]
    fn what_is_under_way_is_pending_again() {
        let mut e = kvm_vcpu_events::default();
        (e.interrupt.injected, e.interrupt.nr) = (1, 0x41);
        (e.nmi.injected, e.nmi.masked) = (1, 1);
        let (events, accepted) = events_from(&e, KVM_MP_STATE_RUNNABLE);
        assert_eq!(accepted, Some(0x41));
        assert!(events.nmis_pending == 1 && !events.nmi_masked);
        e.interrupt.soft = 1;
        assert_eq!(events_from(&e, KVM_MP_STATE_RUNNABLE).1, None);
    }
}
