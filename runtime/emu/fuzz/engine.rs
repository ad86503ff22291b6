//! Runs cases in the engine: the same pages at the same addresses, at privilege level 3.

use std::sync::Arc;

use mvm_emu::Tier;
use mvm_emu::cpu::Cpu;
use mvm_emu::sys::Platform;
use mvm_emu::testing::{UserMachine, UserPage, UserState};

use super::case::{
    CODE, CODE_SIZE, Case, DATA, DATA_SIZE, GS_BASE, MAX_CODE, Outcome, READ_ONLY, fill,
};

const PAGE: usize = 4096;
/// Physical pages: neighbours in the process are none in RAM, so that an access that forgets to
/// translate its second page shows.
const CODE_PAGES: [u64; 2] = [0x2_0000, 0x2_6000];
const DATA_PAGES: [u64; 2] = [0x3_2000, 0x3_0000];
const READ_ONLY_PAGE: u64 = 0x3_4000;

/// The engine with the pages of the fuzzer.
pub struct Engine {
    machine: UserMachine,
}

impl Default for Engine {
    fn default() -> Self {
        Self::new()
    }
}

impl Engine {
    /// The interpreter.
    pub fn new() -> Self {
        Self::with_tier(Tier::Interpreter)
    }

    pub fn with_tier(tier: Tier) -> Self {
        let page = |linear, physical, write, execute| UserPage { linear, physical, write, execute };
        let mut pages = Vec::new();
        for (i, physical) in CODE_PAGES.into_iter().enumerate() {
            pages.push(page(CODE + (i * PAGE) as u64, physical, true, true));
        }
        for (i, physical) in DATA_PAGES.into_iter().enumerate() {
            pages.push(page(DATA + (i * PAGE) as u64, physical, true, false));
        }
        pages.push(page(READ_ONLY, READ_ONLY_PAGE, false, false));
        let mut machine = UserMachine::with_tier(&pages, tier);
        let mut bytes = [0; PAGE];
        fill(0, &mut bytes);
        machine.write(READ_ONLY_PAGE, &bytes);
        Self { machine }
    }

    /// By which another thread can end a run ([`UserMachine::is_stuck`]).
    pub fn platform(&self) -> Arc<Platform> {
        self.machine.attention()
    }

    /// Runs a case. None: it does not end, or the processor shut down.
    pub fn run(&mut self, case: &Case) -> Option<Outcome> {
        self.load(case);
        self.run_looking(case, None)
    }

    /// Runs the last case again, whose code has been decoded before. It must not have changed itself.
    pub fn again(&mut self, case: &Case) -> Option<Outcome> {
        self.run_looking(case, None)
    }

    /// Runs a case one instruction at a time; `look` sees the processor before each.
    pub fn trace(&mut self, case: &Case, look: &mut dyn FnMut(&mut Cpu)) -> Option<Outcome> {
        self.load(case);
        self.run_looking(case, Some(look))
    }

    /// Whether the code is what it was.
    pub fn is_intact(&self, case: &Case) -> bool {
        let mut code = [0; CODE_SIZE];
        for (bytes, page) in code.chunks_exact_mut(PAGE).zip(CODE_PAGES) {
            self.machine.read(page, bytes);
        }
        code == code_of(case)
    }

    fn load(&mut self, case: &Case) {
        for (bytes, page) in code_of(case).chunks_exact(PAGE).zip(CODE_PAGES) {
            self.machine.write(page, bytes);
        }
    }

    fn run_looking(
        &mut self,
        case: &Case,
        look: Option<&mut dyn FnMut(&mut Cpu)>,
    ) -> Option<Outcome> {
        let mut data = [0; DATA_SIZE];
        fill(case.data_seed, &mut data);
        for (bytes, page) in data.chunks_exact(PAGE).zip(DATA_PAGES) {
            self.machine.write(page, bytes);
        }
        let state = UserState {
            gpr: case.state.gpr,
            rip: case.state.rip,
            rflags: case.state.rflags,
            gs_base: GS_BASE,
            xsave: case.state.xsave,
        };
        self.machine.start(&state, case.compat != 0);
        let (exception, end) = self.machine.run(look)?;
        let mut outcome = Outcome {
            state: case.state,
            vector: exception.vector.into(),
            error: exception.error,
            address: exception.address,
            pad: [0; 5],
            data: [0; DATA_SIZE],
        };
        outcome.state.gpr = end.gpr;
        outcome.state.rip = end.rip;
        outcome.state.rflags = end.rflags;
        outcome.state.xsave = end.xsave;
        for (bytes, page) in outcome.data.chunks_exact_mut(PAGE).zip(DATA_PAGES) {
            self.machine.read(page, bytes);
        }
        Some(outcome)
    }
}

/// The code pages.
fn code_of(case: &Case) -> [u8; CODE_SIZE] {
    let mut code = [0xcc; CODE_SIZE];
    let at = (case.state.rip - CODE) as usize;
    let len = (case.len as usize).min(MAX_CODE);
    code[at..at + len].copy_from_slice(&case.code[..len]);
    code
}
