//! What the translator counts.

use super::env::Counted;

/// Counters of one vCPU's translator.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    /// Blocks translated.
    pub blocks: u64,
    /// Instructions in them, and how many of these are called.
    pub instructions: u64,
    /// Instructions that only the interpreter does.
    pub called_instructions: u64,
    /// Accesses to memory in them, and how many of these go by a neighbour's probe.
    pub accesses: u64,
    /// Accesses that go by a neighbour's probe.
    pub spared_probes: u64,
    /// Bytes of guest code translated.
    pub guest_bytes: u64,
    /// Bytes of host code made.
    pub code_bytes: u64,
    /// Jumps linked inside a page.
    pub links: u64,
    /// Pages whose blocks died because they were written to.
    pub killed_pages: u64,
    /// Times translated code was entered by the dispatcher.
    pub entered: u64,
    /// Times it was left: an unlinked jump, an event, an address that the jump cache does not have.
    pub left_unlinked: u64,
    /// For an event.
    pub left_event: u64,
    /// For an address that the jump cache does not have, or an op that ends blocks.
    pub left_to: u64,
    /// Since the code of a block that compares it had changed.
    pub left_changed: u64,
    /// By a handler: transfers, what changes the surroundings, faults, slices of repetitions, HLT.
    pub left_flow: [u64; 6],
    /// Blocks run by the interpreter: code on trial, and bridges to a page that does not follow.
    pub interpreted_blocks: u64,
    /// Bytes of memory for what leads to code.
    pub memory: u64,
    /// What the code counts by itself, if it does.
    pub counted: Option<Counted>,
}

impl Counters {
    /// Names and values, as `mvm stats` shows them.
    pub fn rows(&self) -> Vec<(&'static str, u64)> {
        let [_, jump, stop, fault, again, halt] = self.left_flow;
        let mut rows = vec![
            ("jit-blocks", self.blocks),
            ("jit-instructions", self.instructions),
            ("jit-called-instructions", self.called_instructions),
            ("jit-accesses", self.accesses),
            ("jit-spared-probes", self.spared_probes),
            ("jit-guest-bytes", self.guest_bytes),
            ("jit-code-bytes", self.code_bytes),
            ("jit-links", self.links),
            ("jit-killed-pages", self.killed_pages),
            ("jit-entered", self.entered),
            ("jit-left-unlinked", self.left_unlinked),
            ("jit-left-event", self.left_event),
            ("jit-left-address", self.left_to),
            ("jit-left-changed", self.left_changed),
            ("jit-left-transfer", jump),
            ("jit-left-break", stop),
            ("jit-left-fault", fault),
            ("jit-left-again", again),
            ("jit-left-halt", halt),
            ("jit-interpreted-blocks", self.interpreted_blocks),
            ("jit-memory", self.memory),
        ];
        if let Some(counted) = self.counted {
            // Whatever block was not entered by the dispatcher was reached from another one.
            let chained = counted.blocks.saturating_sub(self.entered);
            rows.extend([
                ("jit-counted-blocks", counted.blocks),
                ("jit-counted-chained", chained),
                ("jit-counted-jump-cache-hits", counted.jump_hits),
                ("jit-counted-returns", counted.returns),
                ("jit-counted-tlb-hits", counted.tlb_hits),
            ]);
        }
        rows
    }
}
