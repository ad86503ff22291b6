//! What the device and the process that serves its queues say to each other, in the shape of
//! vhost-user: the device asks, the server answers each request once, and may report a fault at any
//! time.

use serde::{Deserialize, Serialize};

use crate::virtio::QueueState;

/// From the device to the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "ask")]
pub enum ToServer {
    /// The first message: guest RAM and how to be woken. Its descriptors are, in this order: the
    /// eventfd that the server writes for an interrupt, the doorbell of each queue, and for each
    /// region its RAM and its page tracker.
    Attach {
        /// First address and bytes of each region of RAM.
        regions: Vec<(u64, u64)>,
        /// Greatest size of each queue.
        queues: Vec<u16>,
    },
    /// The driver is ready: start on these queues.
    Activate {
        /// Where they are.
        queues: Vec<QueueState>,
        /// Negotiated features.
        features: u64,
    },
    /// Finish what is under way and keep the queues.
    Pause,
    /// Go on.
    Resume,
    /// Finish what is under way and forget queues and driver.
    Stop,
}

/// From the server to the device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "answer")]
pub enum FromServer {
    /// It is done; where the queues are now.
    Done {
        /// Empty if none is open.
        queues: Vec<QueueState>,
    },
    /// It cannot be done.
    Refused {
        /// Why.
        message: String,
    },
    /// The driver has broken a rule of the rings.
    Failed {
        /// Which.
        message: String,
    },
}
