//! Redirection: what comes in at one device goes out at another (tc-mirred(8)).
//!
//! A `u32` filter that matches everything, on the ingress side of the one device, with the action
//! `mirred egress redirect` to the other. `u32` is there in every kernel that has traffic control at
//! all, where `matchall` and `flower` may be missing.

use crate::message::{Message, attribute, attributes, text, u32_at};
use crate::socket::{
    Error, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, Socket,
};

const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_GETTFILTER: u16 = 46;
const TC_H_INGRESS: u32 = 0xffff_fff1;
/// The handle that an ingress discipline has, always.
const INGRESS: u32 = 0xffff_0000;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TC_ACT_STOLEN: u32 = 4;
const TCA_EGRESS_REDIR: u32 = 1;
const TC_U32_TERMINAL: u8 = 1;
/// `struct tc_u32_sel` with one `struct tc_u32_key`: the bits of nothing are compared with nothing.
const MATCH_ALL: [u8; 32] = {
    let mut selector = [0; 32];
    selector[0] = TC_U32_TERMINAL;
    selector[2] = 1;
    selector
};
/// Where the target is in `struct tc_mirred`.
const MIRRED_TARGET: usize = 24;
/// ETH_P_ALL, in network byte order, as the kernel wants it in `tcm_info`.
const ALL_PROTOCOLS: u32 = 0x0300;
/// `struct tcmsg`.
const HEADER: usize = 20;

fn header(index: u32, handle: u32, parent: u32, info: u32) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    for (at, word) in [(4, index), (8, handle), (12, parent), (16, info)] {
        header[at..at + 4].copy_from_slice(&word.to_ne_bytes());
    }
    header
}

/// A filter on the ingress side of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Redirection {
    /// Its priority, by which its maker can be told.
    pub priority: u16,
    /// Number of the device that packets are redirected to, if that is what it does.
    pub target: Option<u32>,
}

impl Redirection {
    fn parse(body: &[u8]) -> Option<Self> {
        let priority = (u32_at(body, 16)? >> 16) as u16;
        let about = body.get(HEADER..)?;
        let options = attribute(about, TCA_OPTIONS).unwrap_or_default();
        if attribute(about, TCA_KIND).map(text).as_deref() != Some("u32") {
            return Some(Self { priority, target: None });
        }
        // The table of hashes that goes with each u32 filter is listed too.
        attribute(options, TCA_U32_SEL)?;
        let actions = attribute(options, TCA_U32_ACT).unwrap_or_default();
        let target = attributes(actions).find_map(|(_, action)| {
            let kind = attribute(action, TCA_ACT_KIND).map(text);
            let options = attribute(action, TCA_ACT_OPTIONS)?;
            let parameters = attribute(options, TCA_MIRRED_PARMS)?;
            (kind.as_deref() == Some("mirred")).then(|| u32_at(parameters, MIRRED_TARGET))?
        });
        Some(Self { priority, target })
    }
}

impl Socket {
    /// Gives device `index` an ingress side.
    ///
    /// # Errors
    /// [`Error`]: EEXIST if it has one, ENOENT if the kernel knows no such thing.
    pub fn add_ingress(&mut self, index: u32) -> Result<(), Error> {
        let how = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        let mut message = Message::new(RTM_NEWQDISC, how, &header(index, INGRESS, TC_H_INGRESS, 0));
        message.attribute(TCA_KIND, b"ingress\0");
        self.request(&format!("give network device {index} an ingress discipline"), message)
    }

    /// Takes it away with all its filters.
    ///
    /// # Errors
    /// [`Error`].
    pub fn delete_ingress(&mut self, index: u32) -> Result<(), Error> {
        let header = header(index, INGRESS, TC_H_INGRESS, 0);
        let message = Message::new(RTM_DELQDISC, NLM_F_REQUEST | NLM_F_ACK, &header);
        self.request(&format!("remove the ingress discipline of network device {index}"), message)
    }

    /// Sends everything that comes in at device `from` out at device `to`.
    ///
    /// # Errors
    /// [`Error`]: ENOENT if the kernel lacks the filter or the action.
    pub fn redirect(&mut self, from: u32, to: u32, priority: u16) -> Result<(), Error> {
        let how = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        let info = u32::from(priority) << 16 | ALL_PROTOCOLS;
        let mut message = Message::new(RTM_NEWTFILTER, how, &header(from, 0, INGRESS, info));
        let mut mirred = [0; 28];
        for (at, word) in [(8, TC_ACT_STOLEN), (20, TCA_EGRESS_REDIR), (MIRRED_TARGET, to)] {
            mirred[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        }
        message.attribute(TCA_KIND, b"u32\0").nested(TCA_OPTIONS, |options| {
            options.attribute(TCA_U32_SEL, &MATCH_ALL).nested(TCA_U32_ACT, |actions| {
                actions.nested(1, |action| {
                    action.attribute(TCA_ACT_KIND, b"mirred\0").nested(
                        TCA_ACT_OPTIONS,
                        |options| {
                            options.attribute(TCA_MIRRED_PARMS, &mirred);
                        },
                    );
                });
            });
        });
        self.request(&format!("redirect network device {from} to {to}"), message)
    }

    /// The filters on the ingress side of device `index`.
    ///
    /// # Errors
    /// [`Error`].
    pub fn redirections(&mut self, index: u32) -> Result<Vec<Redirection>, Error> {
        let header = header(index, 0, INGRESS, 0);
        let message = Message::new(RTM_GETTFILTER, NLM_F_REQUEST | NLM_F_DUMP, &header);
        let all = self.dump("list the filters", &message)?;
        let filters = all.iter().filter(|(kind, _)| *kind == RTM_NEWTFILTER);
        Ok(filters.filter_map(|(_, body)| Redirection::parse(body)).collect())
    }
}
