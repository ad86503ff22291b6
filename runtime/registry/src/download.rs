//! Everything that an image consists of, several blobs at a time.

use std::collections::HashSet;
use std::io::Write;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use mvm_image::{Blob, Digest, Incoming, Limits, Progress, Silent, StoreError, needed};
use oci_client::client::BlobResponse;

use crate::PullError;
use crate::connection::Connection;
use crate::error::{Failure, classify};

/// Blobs that are on their way at once, as with Docker.
const AT_ONCE: usize = 3;

/// How often something is asked for again without anything new coming, and the pauses before that.
const PAUSES: [Duration; 4] = [
    Duration::from_millis(200),
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(8),
];

/// Indexes that refer to indexes.
const NESTING_MAX: usize = 4;

/// Fetches all of the image, and returns the digest of its first document.
pub(crate) async fn fetch(
    connection: &Connection,
    incoming: &Incoming<'_>,
    limits: &Limits,
    progress: &dyn Progress,
) -> Result<Digest, PullError> {
    let bytes = document(connection, &connection.reference, limits).await?;
    let top = incoming.put(&bytes)?;
    let blobs = walk(connection, incoming, limits, &bytes).await?;
    progress.end();

    let mut wanted = Vec::new();
    for blob in &blobs {
        if !incoming.has(&blob.digest, blob.size)? {
            wanted.push(blob);
        }
    }
    let total = wanted.iter().map(|blob| blob.size).sum();
    let step = match (wanted.len(), blobs.len()) {
        (some, all) if some == all => format!("pull {}", connection.name),
        (some, all) => format!("pull {} ({some} of {all} parts)", connection.name),
    };
    progress.begin(&step, Some(total));
    futures_util::stream::iter(wanted.into_iter().map(Ok))
        .try_for_each_concurrent(AT_ONCE, |blob| self::blob(connection, incoming, blob, progress))
        .await?;
    Ok(top)
}

/// The documents below `top`, which are kept, and the blobs that they refer to.
async fn walk(
    connection: &Connection,
    incoming: &Incoming<'_>,
    limits: &Limits,
    top: &[u8],
) -> Result<Vec<Blob>, PullError> {
    let too_much =
        |limit, what| PullError::TooMuch { name: connection.name.to_string(), limit, what };
    let (mut blobs, mut seen) = (Vec::new(), HashSet::new());
    let (mut bytes, mut documents) = (0_u64, 0);
    let mut level = vec![top.to_vec()];
    for _ in 0..=NESTING_MAX {
        let mut next = Vec::new();
        for document in &level {
            for part in needed(document, limits)? {
                if !seen.insert(part.digest) {
                    continue;
                }
                if part.is_document {
                    documents += 1;
                    if documents > limits.manifests {
                        return Err(too_much(limits.manifests as u64, "manifests"));
                    }
                    let of_digest = connection.reference.clone_with_digest(part.digest.to_string());
                    let document = self::document(connection, &of_digest, limits).await?;
                    let found = incoming.put(&document)?;
                    if found != part.digest {
                        let (registry, expected) = (connection.registry.clone(), part.digest);
                        return Err(PullError::Digest { registry, expected, found });
                    }
                    next.push(document);
                } else {
                    bytes = bytes.saturating_add(part.size);
                    if bytes > limits.unpacked_bytes {
                        return Err(too_much(limits.unpacked_bytes, "bytes"));
                    }
                    blobs.push(part);
                }
            }
        }
        if next.is_empty() {
            return Ok(blobs);
        }
        level = next;
    }
    Err(too_much(NESTING_MAX as u64, "levels of indexes"))
}

async fn document(
    connection: &Connection,
    reference: &oci_client::Reference,
    limits: &Limits,
) -> Result<Vec<u8>, PullError> {
    let mut pauses = PAUSES.iter();
    loop {
        match connection.document(reference).await {
            Ok(bytes) if bytes.len() as u64 > limits.document_bytes => {
                return Err(PullError::DocumentSize {
                    name: connection.name.to_string(),
                    size: bytes.len() as u64,
                    limit: limits.document_bytes,
                });
            }
            Ok(bytes) => return Ok(bytes),
            Err(failure) => wait_or_fail(failure, &mut pauses).await?,
        }
    }
}

/// The rest of a blob, of which some may be there from before.
async fn blob(
    connection: &Connection,
    incoming: &Incoming<'_>,
    blob: &Blob,
    progress: &dyn Progress,
) -> Result<(), PullError> {
    let mut pauses = PAUSES.iter();
    let mut told = 0;
    // What was there before may be what is wrong, so that once it is fetched anew.
    let mut is_ours = false;
    loop {
        let before = length(incoming, blob)?;
        is_ours |= before == 0;
        let outcome = match before < blob.size {
            true => rest(connection, incoming, blob, before, &mut told, progress).await,
            false => Ok(()),
        };
        let after = length(incoming, blob)?;
        if let Err(failure) = outcome {
            if after > before {
                pauses = PAUSES.iter();
            }
            wait_or_fail(failure, &mut pauses).await?;
            continue;
        }
        if after == blob.size {
            let found = incoming.complete(&blob.digest, &Silent)?;
            if found == blob.digest {
                progress.advance(blob.size.saturating_sub(told));
                return Ok(());
            }
            if is_ours {
                let (registry, expected) = (connection.registry.clone(), blob.digest);
                return Err(PullError::Digest { registry, expected, found });
            }
        } else {
            let ended = Failure {
                error: PullError::Unreachable {
                    registry: connection.registry.clone(),
                    reason: format!("{} ended after {after} of {} bytes", blob.digest, blob.size),
                },
                passing: true,
            };
            if after > before {
                pauses = PAUSES.iter();
            }
            wait_or_fail(ended, &mut pauses).await?;
        }
    }
}

/// Bytes that are there; what is longer than the blob is no part of it.
fn length(incoming: &Incoming<'_>, blob: &Blob) -> Result<u64, PullError> {
    let file = incoming.partial(&blob.digest)?;
    let failed = |e| StoreError::io("write", incoming.path())(e);
    let length = file.metadata().map_err(failed)?.len();
    if length <= blob.size {
        return Ok(length);
    }
    file.set_len(0).map_err(failed)?;
    Ok(0)
}

/// Asks for what comes after `offset`, and writes down what comes.
async fn rest(
    connection: &Connection,
    incoming: &Incoming<'_>,
    blob: &Blob,
    offset: u64,
    told: &mut u64,
    progress: &dyn Progress,
) -> Result<(), Failure> {
    let digest = blob.digest.to_string();
    let classified = |e| classify(&connection.registry, &connection.name, e);
    let mut file = incoming.partial(&blob.digest).map_err(Failure::lasting)?;
    let write_failed = || StoreError::io("write", incoming.path());
    let (mut stream, mut at) = if offset == 0 {
        let asked = connection.client.pull_blob_stream(&connection.reference, digest.as_str());
        (asked.await.map_err(classified)?, 0)
    } else {
        let asked = connection.client.pull_blob_stream_partial(
            &connection.reference,
            digest.as_str(),
            offset,
            None,
        );
        match asked.await.map_err(classified)? {
            BlobResponse::Partial(stream) => (stream, offset),
            // A registry that knows no ranges begins anew, and so do we.
            BlobResponse::Full(stream) => {
                file.set_len(0).map_err(write_failed()).map_err(Failure::lasting)?;
                (stream, 0)
            }
        }
    };
    // What was there before counts as come.
    let mut tell = |at: u64| {
        progress.advance(at.saturating_sub(*told));
        *told = at.max(*told);
    };
    tell(at);
    while let Some(bytes) = stream.next().await {
        let bytes = match bytes {
            Ok(bytes) => bytes,
            // The client has checked the digest of all that came; we do that where we can say more.
            Err(_) if at == blob.size => break,
            Err(e) => {
                return Err(classified(oci_client::errors::OciDistributionError::IoError(e)));
            }
        };
        at += bytes.len() as u64;
        if at > blob.size {
            return Err(Failure::lasting(PullError::TooLong {
                registry: connection.registry.clone(),
                digest: blob.digest,
                size: blob.size,
            }));
        }
        file.write_all(&bytes).map_err(write_failed()).map_err(Failure::lasting)?;
        tell(at);
    }
    Ok(())
}

/// Waits before the next attempt, if there is to be one.
async fn wait_or_fail(
    failure: Failure,
    pauses: &mut std::slice::Iter<'_, Duration>,
) -> Result<(), PullError> {
    match (failure.passing, pauses.next()) {
        (true, Some(pause)) => {
            tracing::debug!(error = %failure.error, ?pause, "asking again");
            tokio::time::sleep(*pause).await;
            Ok(())
        }
        _ => Err(failure.error),
    }
}
