//! Events to containerd's own ttrpc socket.
//!
//! One thread sends, one event after the other. containerd may be restarted meanwhile: an event is
//! tried again for a while, and dropped only then. Whoever reconnects asks for states anyway.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::ttrpc::context::with_duration;
use containerd_shim_protos::{Client, EventsClient};

use super::{Event, Sink};

/// How long containerd may take for one event.
const ANSWER: Duration = Duration::from_secs(5);

/// How long an event is tried again for.
const TRIES: Duration = Duration::from_secs(60);

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(500);

/// Most events that wait; what comes when so many do is dropped.
const QUEUE: usize = 4096;

/// Sends events to containerd.
#[derive(Debug)]
pub struct Remote {
    /// `None` once no more are taken.
    queue: Mutex<Option<SyncSender<(SystemTime, Event)>>>,
    ended: Mutex<Receiver<()>>,
    _thread: JoinHandle<()>,
}

impl Remote {
    /// Events of `namespace` go to the socket at `address`.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn new(address: &str, namespace: &str) -> std::io::Result<Self> {
        let (queue, events) = sync_channel(QUEUE);
        let (tell, ended) = channel();
        let worker = Worker {
            address: if address.contains("://") {
                address.to_owned()
            } else {
                format!("unix://{address}")
            },
            namespace: namespace.to_owned(),
            client: None,
            _ended: tell,
        };
        let thread = std::thread::Builder::new().name("events".into());
        let thread = thread.spawn(move || worker.run(&events))?;
        Ok(Self { queue: Mutex::new(Some(queue)), ended: Mutex::new(ended), _thread: thread })
    }

    /// Takes no more, and waits until all are sent, for at most `limit`.
    pub fn flush(&self, limit: Duration) {
        drop(self.queue.lock().unwrap_or_else(PoisonError::into_inner).take());
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(limit) {
            tracing::warn!("containerd did not take all events within {limit:?}");
        }
    }
}

impl Sink for Remote {
    fn publish(&self, event: Event) {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = match queue.as_ref() {
            Some(queue) => queue.try_send((SystemTime::now(), event)).is_ok(),
            None => false,
        };
        if !sent {
            tracing::warn!("an event is dropped: {QUEUE} wait for containerd, or this is the end");
        }
    }
}

struct Worker {
    address: String,
    namespace: String,
    client: Option<EventsClient>,
    /// Dropped when there is nothing more to do.
    _ended: Sender<()>,
}

impl Worker {
    fn run(mut self, events: &Receiver<(SystemTime, Event)>) {
        while let Ok((at, event)) = events.recv() {
            let topic = event.topic();
            let envelope = match self.envelope(at, &event) {
                Ok(envelope) => envelope,
                Err(e) => {
                    tracing::error!("cannot encode an event of {topic}: {e}");
                    continue;
                }
            };
            let until = Instant::now() + TRIES;
            while let Err(e) = self.send(&envelope) {
                if Instant::now() >= until {
                    tracing::warn!("an event of {topic} is dropped: {e}");
                    break;
                }
                std::thread::sleep(PAUSE);
            }
        }
    }

    fn envelope(
        &self,
        at: SystemTime,
        event: &Event,
    ) -> Result<ForwardRequest, containerd_shim_protos::protobuf::Error> {
        let envelope = Envelope {
            timestamp: MessageField::some(crate::timestamp(at)),
            namespace: self.namespace.clone(),
            topic: event.topic().to_owned(),
            event: MessageField::some(event.any()?),
            ..Envelope::default()
        };
        Ok(ForwardRequest { envelope: MessageField::some(envelope), ..ForwardRequest::default() })
    }

    fn send(
        &mut self,
        request: &ForwardRequest,
    ) -> Result<(), containerd_shim_protos::ttrpc::Error> {
        let client = match self.client.take() {
            Some(client) => client,
            None => EventsClient::new(Client::connect(&self.address)?),
        };
        client.forward(with_duration(ANSWER), request)?;
        // Kept only while it works: a broken one is made anew.
        self.client = Some(client);
        Ok(())
    }
}
