//! What containerd is told of, in order.

pub mod remote;

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Error, MessageFull};
use containerd_shim_protos::topics;

/// Something that happened to a container or process.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A container was prepared.
    Create(TaskCreate),
    /// Its first process was started.
    Start(TaskStart),
    /// A process ended.
    Exit(TaskExit),
    /// A memory limit ended a process.
    Oom(TaskOOM),
    /// A container was forgotten.
    Delete(TaskDelete),
    /// A further process was announced.
    ExecAdded(TaskExecAdded),
    /// It was started.
    ExecStarted(TaskExecStarted),
    /// A container was frozen.
    Paused(TaskPaused),
    /// It goes on.
    Resumed(TaskResumed),
}

impl Event {
    /// The topic under which containerd spreads it.
    pub fn topic(&self) -> &'static str {
        match self {
            Self::Create(_) => topics::TASK_CREATE_EVENT_TOPIC,
            Self::Start(_) => topics::TASK_START_EVENT_TOPIC,
            Self::Exit(_) => topics::TASK_EXIT_EVENT_TOPIC,
            Self::Oom(_) => topics::TASK_OOM_EVENT_TOPIC,
            Self::Delete(_) => topics::TASK_DELETE_EVENT_TOPIC,
            Self::ExecAdded(_) => topics::TASK_EXEC_ADDED_EVENT_TOPIC,
            Self::ExecStarted(_) => topics::TASK_EXEC_STARTED_EVENT_TOPIC,
            Self::Paused(_) => topics::TASK_PAUSED_EVENT_TOPIC,
            Self::Resumed(_) => topics::TASK_RESUMED_EVENT_TOPIC,
        }
    }

    /// The message with the name of its type.
    ///
    /// # Errors
    /// It cannot be encoded.
    pub fn any(&self) -> Result<Any, Error> {
        match self {
            Self::Create(e) => any(e),
            Self::Start(e) => any(e),
            Self::Exit(e) => any(e),
            Self::Oom(e) => any(e),
            Self::Delete(e) => any(e),
            Self::ExecAdded(e) => any(e),
            Self::ExecStarted(e) => any(e),
            Self::Paused(e) => any(e),
            Self::Resumed(e) => any(e),
        }
    }
}

/// A message with the name of its type in containerd's form, which is without a host.
///
/// # Errors
/// It cannot be encoded.
pub fn any<M: MessageFull>(message: &M) -> Result<Any, Error> {
    Ok(Any {
        type_url: M::descriptor().full_name().to_owned(),
        value: message.write_to_bytes()?,
        ..Any::default()
    })
}

/// Takes events. Publishing never waits for containerd, and keeps the order.
pub trait Sink: Send + Sync {
    /// Takes one.
    fn publish(&self, event: Event);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_bear_containerds_names() {
        let event = Event::Exit(TaskExit { exit_status: 3, ..TaskExit::default() });
        assert_eq!(event.topic(), "/tasks/exit");
        let any = event.any().unwrap();
        assert_eq!(any.type_url, "containerd.events.TaskExit");
        assert_eq!(any.value, [0x20, 3]);
    }
}
