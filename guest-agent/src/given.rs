//! Block devices of the host that the guest has as disks: what the specification says of them by the host's numbers is
//! said by the guest's.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;

use mvm_agent_protocol::messages::GivenDevice;
use serde_json::Value;

use crate::blockdev;
use crate::error::{Context, Error, Result};

type Number = (u32, u32);

/// The specification for this guest.
pub fn translate<'a>(spec_json: &'a [u8], devices: &[GivenDevice]) -> Result<Cow<'a, [u8]>> {
    if devices.is_empty() {
        return Ok(Cow::Borrowed(spec_json));
    }
    let mut numbers = BTreeMap::new();
    for given in devices {
        let node = blockdev::node(given.device.get_or_default())?;
        let about = std::fs::metadata(&node).context(|| format!("look at {}", node.display()))?;
        let number = about.rdev();
        let number = (rustix::fs::major(number), rustix::fs::minor(number));
        numbers.insert((given.major, given.minor), number);
    }
    replace(spec_json, &numbers).map(Cow::Owned)
}

fn replace(spec_json: &[u8], numbers: &BTreeMap<Number, Number>) -> Result<Vec<u8>> {
    let malformed = |e: serde_json::Error| Error::Invalid(format!("the specification: {e}"));
    let mut spec: Value = serde_json::from_slice(spec_json).map_err(malformed)?;
    for list in ["/linux/devices", "/linux/resources/devices"] {
        for entry in spec.pointer_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            let number = |key: &str| entry[key].as_u64().and_then(|n| u32::try_from(n).ok());
            let is_block = entry["type"] == "b";
            let own = number("major").zip(number("minor"));
            if let (true, Some((major, minor))) = (is_block, own.and_then(|own| numbers.get(&own)))
            {
                entry["major"] = (*major).into();
                entry["minor"] = (*minor).into();
            }
        }
    }
    serde_json::to_vec(&spec).map_err(malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn devices_and_rules_are_renumbered_and_nothing_else() {
        let spec = json!({ "linux": {
            "devices": [
                { "path": "/dev/data", "type": "b", "major": 7, "minor": 3 },
                { "path": "/dev/char", "type": "c", "major": 7, "minor": 3 },
                { "path": "/dev/other", "type": "b", "major": 7, "minor": 4 },
            ],
            "resources": { "devices": [
                { "allow": false, "access": "rwm" },
                { "allow": true, "type": "b", "major": 7, "minor": 3, "access": "rw" },
                { "allow": true, "type": "b", "major": -1, "minor": 3, "access": "rw" },
            ] },
        } });
        let numbers = BTreeMap::from([((7, 3), (254, 16))]);
        let text = replace(spec.to_string().as_bytes(), &numbers).unwrap();
        let mut want = spec;
        for place in ["/linux/devices/0", "/linux/resources/devices/1"] {
            let entry = want.pointer_mut(place).unwrap();
            (entry["major"], entry["minor"]) = (json!(254), json!(16));
        }
        assert_eq!(serde_json::from_slice::<Value>(&text).unwrap(), want);
        // What is hostile is refused further on, and harmless here.
        for odd in
            ["{}", "{\"linux\":[]}", "{\"linux\":{\"devices\":[1,{\"type\":\"b\",\"major\":-7}]}}"]
        {
            replace(odd.as_bytes(), &numbers).unwrap();
        }
        assert!(replace(b"{", &numbers).is_err());
        assert!(matches!(translate(b"{", &[]).unwrap(), Cow::Borrowed(b"{")));
    }
}
