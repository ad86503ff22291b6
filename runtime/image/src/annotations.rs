//! What is said of an image outside its manifest: by the descriptor that leads to it, and by the
//! indexes on the way.

use std::collections::{BTreeMap, HashMap};

/// Most bytes of keys and values that are kept of one image.
const KEPT_MAX: usize = 64 << 10;

/// Keys that say where an image is or what it is called there, which is not true here any more, and
/// those that the store says something by.
const OF_THE_PLACE: [&str; 4] = [
    "org.opencontainers.image.ref.name",
    "io.containerd.image.name",
    "containerd.io/distribution.source.",
    "mvm.",
];

/// Annotations by their keys.
pub(crate) type Annotations = BTreeMap<String, String>;

/// `outer`, with what `inner`, which is nearer to the image, says in place of it.
pub(crate) fn merged(outer: &Annotations, inner: &Option<HashMap<String, String>>) -> Annotations {
    let mut all = outer.clone();
    for (key, value) in inner.iter().flatten() {
        if !OF_THE_PLACE.iter().any(|prefix| key.starts_with(prefix)) {
            all.insert(key.clone(), value.clone());
        }
    }
    all
}

/// As many of `annotations` as are kept, in the order of their keys, and how many are not.
pub(crate) fn kept(annotations: Annotations) -> (Annotations, usize) {
    let (mut left, count) = (KEPT_MAX, annotations.len());
    let fits = |(key, value): &(String, String)| {
        let rest = left.checked_sub(key.len() + value.len());
        left = rest.unwrap_or(left);
        rest.is_some()
    };
    let kept: Annotations = annotations.into_iter().filter(fits).collect();
    let lost = count - kept.len();
    (kept, lost)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearer_word_counts_and_places_do_not() {
        let outer = Annotations::from([("a".into(), "1".into()), ("b".into(), "1".into())]);
        let inner = [
            ("b", "2"),
            ("org.opencontainers.image.ref.name", "x"),
            ("mvm.imported", "9"),
            ("containerd.io/distribution.source.example", "x"),
        ];
        let inner = inner.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let want = [("a".to_owned(), "1".to_owned()), ("b".to_owned(), "2".to_owned())];
        assert_eq!(merged(&outer, &Some(inner)), want.into());
        assert_eq!(merged(&outer, &None), outer);
    }

    #[test]
    fn no_image_fills_the_index() {
        let large = "x".repeat(KEPT_MAX - 1);
        let all = [("a", large.as_str()), ("b", "too much"), ("c", "")];
        let all: Annotations = all.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let (kept, lost) = kept(all);
        assert_eq!((kept.len(), lost), (1, 2));
        assert!(kept.contains_key("a"));
    }
}
