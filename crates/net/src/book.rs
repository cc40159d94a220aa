//! The tickets that a coordinator has made, in `<state-dir>/tickets.json`.
//!
//! Of a secret only a hash is kept, so the file admits nobody. Times are seconds since 1970, given by the caller.

use std::path::{Path, PathBuf};
use std::time::Duration;

use brigade_base::NodeId;
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

use crate::store::{StoreError, read_json, write_json};
use crate::ticket::{SECRET_BYTES, Secret, TICKET_ID_BYTES, Ticket, TicketId, TicketSecret};
use crate::{Address, Refusal};

const FILE: &str = "tickets.json";

/// Most tickets in the book. People make a few a day; this bounds the file and the time to search it.
pub const MAX_TICKETS: usize = 1024;

/// Longest `tickets.json` that is read: an entry has at most 200 bytes, so 1024 of them stay below 256 KiB.
const MAX_FILE: u64 = 256 << 10;

/// How long an expired ticket is remembered, so that its bearer hears "expired" instead of "unknown": a week.
const REMEMBER_EXPIRED_S: u64 = 7 * 24 * 60 * 60;

/// Keeps these hashes apart from all others.
const HASH_CONTEXT: &str = "brigade 2026 ticket secret";

/// All tickets of one coordinator. Every change is on disk when the method returns.
#[derive(Debug)]
pub struct TicketBook {
    path: PathBuf,
    records: Vec<Record>,
}

#[derive(Debug, Clone)]
struct Record {
    id: TicketId,
    secret_hash: blake3::Hash,
    expires_unix_s: u64,
    revoked: bool,
}

/// A ticket without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TicketEntry {
    /// Names the ticket.
    pub id: TicketId,
    /// When it expires, in seconds since 1970.
    pub expires_unix_s: u64,
    /// Whether it admits anybody.
    pub state: TicketState,
}

/// Whether a ticket admits anybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TicketState {
    /// It does.
    Valid,
    /// Its time is over.
    Expired,
    /// It was made void.
    Revoked,
}

/// Why a ticket was not made.
#[derive(Debug, thiserror::Error)]
pub enum TicketBookError {
    /// The book is full of valid tickets.
    #[error("there are {MAX_TICKETS} valid tickets already; revoke some, or let them expire")]
    Full,
    /// The system gave no random bytes.
    #[error("the system gave no random bytes to make a ticket from")]
    Random,
    /// The book could not be stored.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// How the book looks on disk.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BookFile {
    tickets: Vec<RecordFile>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordFile {
    id: String,
    secret_blake3: String,
    expires_unix_s: u64,
    revoked: bool,
}

impl TicketBook {
    /// Opens the book in `dir`; empty if there is none yet.
    ///
    /// # Errors
    /// If the file cannot be read or is damaged.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join(FILE);
        let Some(file) = read_json::<BookFile>(&path, MAX_FILE)? else { return Ok(Self { path, records: Vec::new() }) };
        let damaged = |reason: &str| StoreError::Damaged { path: path.clone(), reason: reason.to_owned() };
        if file.tickets.len() > MAX_TICKETS {
            return Err(damaged("it has too many tickets"));
        }
        let records = file.tickets.into_iter().map(RecordFile::read).collect::<Option<_>>();
        let records = records.ok_or_else(|| damaged("an id or hash is not hexadecimal"))?;
        Ok(Self { path, records })
    }

    /// Makes a ticket that admits nodes to `coordinator`, reachable at `addrs`, for `ttl` from `now_unix_s` on.
    /// It admits any number of nodes.
    ///
    /// # Errors
    /// If the book is full or cannot be stored; then there is no ticket.
    pub fn create(
        &mut self,
        coordinator: NodeId,
        addrs: Vec<Address>,
        ttl: Duration,
        now_unix_s: u64,
    ) -> Result<Ticket, TicketBookError> {
        let mut random = [0u8; TICKET_ID_BYTES + SECRET_BYTES];
        SystemRandom::new().fill(&mut random).map_err(|_| TicketBookError::Random)?;
        let (id, secret) = random.split_at(TICKET_ID_BYTES);
        let id = TicketId::from_bytes(id.try_into().map_err(|_| TicketBookError::Random)?);
        let secret = Secret::from_bytes(secret.try_into().map_err(|_| TicketBookError::Random)?);

        let mut records = self.records.clone();
        records.retain(|record| record.expires_unix_s.saturating_add(REMEMBER_EXPIRED_S) > now_unix_s);
        if records.len() >= MAX_TICKETS {
            records.retain(|record| record.state(now_unix_s) == TicketState::Valid);
        }
        if records.len() >= MAX_TICKETS {
            return Err(TicketBookError::Full);
        }
        records.push(Record {
            id,
            secret_hash: hash(id, &secret),
            expires_unix_s: now_unix_s.saturating_add(ttl.as_secs()),
            revoked: false,
        });
        store(&self.path, &records)?;
        self.records = records;
        Ok(Ticket { coordinator, addrs, id, secret })
    }

    /// Whether the bearer of `admission` may join now.
    ///
    /// # Errors
    /// If not: [`Refusal::TicketUnknown`] for a wrong id or secret, which sound the same; [`Refusal::TicketRevoked`] or
    /// [`Refusal::TicketExpired`] to who has the secret.
    pub fn check(&self, admission: &TicketSecret, now_unix_s: u64) -> Result<(), Refusal> {
        let record = self.records.iter().find(|record| record.id == admission.id);
        // Comparing BLAKE3 hashes takes constant time.
        let record = record.filter(|record| record.secret_hash == hash(admission.id, &admission.secret));
        match record.ok_or(Refusal::TicketUnknown)?.state(now_unix_s) {
            TicketState::Valid => Ok(()),
            TicketState::Revoked => Err(Refusal::TicketRevoked),
            TicketState::Expired => Err(Refusal::TicketExpired),
        }
    }

    /// Makes a ticket void; nodes that joined with it stay. False if there is none of this id.
    ///
    /// # Errors
    /// If it could not be stored. The ticket is then void until the coordinator starts again.
    pub fn revoke(&mut self, id: TicketId) -> Result<bool, StoreError> {
        let Some(record) = self.records.iter_mut().find(|record| record.id == id) else { return Ok(false) };
        record.revoked = true;
        store(&self.path, &self.records)?;
        Ok(true)
    }

    /// All tickets that are remembered, the oldest first.
    pub fn list(&self, now_unix_s: u64) -> Vec<TicketEntry> {
        let entry = |record: &Record| TicketEntry {
            id: record.id,
            expires_unix_s: record.expires_unix_s,
            state: record.state(now_unix_s),
        };
        self.records.iter().map(entry).collect()
    }
}

impl Record {
    fn state(&self, now_unix_s: u64) -> TicketState {
        match self {
            Self { revoked: true, .. } => TicketState::Revoked,
            Self { expires_unix_s, .. } if *expires_unix_s <= now_unix_s => TicketState::Expired,
            _ => TicketState::Valid,
        }
    }
}

impl RecordFile {
    fn read(self) -> Option<Record> {
        Some(Record {
            id: self.id.parse().ok()?,
            secret_hash: blake3::Hash::from_hex(&self.secret_blake3).ok()?,
            expires_unix_s: self.expires_unix_s,
            revoked: self.revoked,
        })
    }

    fn of(record: &Record) -> Self {
        Self {
            id: record.id.to_string(),
            secret_blake3: record.secret_hash.to_hex().to_string(),
            expires_unix_s: record.expires_unix_s,
            revoked: record.revoked,
        }
    }
}

fn store(path: &Path, records: &[Record]) -> Result<(), StoreError> {
    write_json(path, &BookFile { tickets: records.iter().map(RecordFile::of).collect() })
}

fn hash(id: TicketId, secret: &Secret) -> blake3::Hash {
    blake3::Hasher::new_derive_key(HASH_CONTEXT).update(id.as_bytes()).update(secret.as_bytes()).finalize()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const NOW: u64 = 1_800_000_000;
    const HOUR: Duration = Duration::from_secs(3600);

    struct Fixture {
        dir: tempfile::TempDir,
        book: TicketBook,
    }

    impl Fixture {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let book = TicketBook::open(dir.path()).unwrap();
            Self { dir, book }
        }

        fn create(&mut self, ttl: Duration, now: u64) -> Ticket {
            self.book.create(NodeId::from_bytes([1; 32]), vec!["10.0.0.1:7100".parse().unwrap()], ttl, now).unwrap()
        }

        fn reopen(&mut self) {
            self.book = TicketBook::open(self.dir.path()).unwrap();
        }
    }

    #[test]
    fn a_ticket_admits_until_it_expires_even_after_a_restart() {
        let mut f = Fixture::new();
        let ticket = f.create(HOUR, NOW);
        f.reopen();
        assert_eq!(f.book.check(&ticket.admission(), NOW), Ok(()));
        assert_eq!(f.book.check(&ticket.admission(), NOW + 3599), Ok(()));
        assert_eq!(f.book.check(&ticket.admission(), NOW + 3600), Err(Refusal::TicketExpired));
    }

    #[test]
    fn a_revoked_ticket_is_void_even_after_a_restart() {
        let mut f = Fixture::new();
        let (ticket, other) = (f.create(HOUR, NOW), f.create(HOUR, NOW));
        assert!(f.book.revoke(ticket.id).unwrap());
        assert!(!f.book.revoke(TicketId::from_bytes([0; 8])).unwrap());
        f.reopen();
        assert_eq!(f.book.check(&ticket.admission(), NOW), Err(Refusal::TicketRevoked));
        assert_eq!(f.book.check(&other.admission(), NOW), Ok(()));
        let states: Vec<_> = f.book.list(NOW).into_iter().map(|entry| (entry.id, entry.state)).collect();
        assert_eq!(states, [(ticket.id, TicketState::Revoked), (other.id, TicketState::Valid)]);
    }

    #[test]
    fn a_wrong_secret_learns_nothing() {
        let mut f = Fixture::new();
        let ticket = f.create(HOUR, NOW);
        f.book.revoke(ticket.id).unwrap();
        for (id, secret) in [(ticket.id, Secret::from_bytes([0; 16])), (TicketId::from_bytes([9; 8]), ticket.secret)] {
            assert_eq!(f.book.check(&TicketSecret { id, secret }, NOW), Err(Refusal::TicketUnknown));
        }
    }

    #[test]
    fn the_file_does_not_contain_the_secret() {
        let mut f = Fixture::new();
        let ticket = f.create(HOUR, NOW);
        let text = fs::read_to_string(f.dir.path().join(FILE)).unwrap();
        let hex: String = ticket.secret.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(text.contains(&ticket.id.to_string()) && !text.contains(&hex));
    }

    #[test]
    fn long_expired_tickets_are_forgotten_when_one_is_made() {
        let mut f = Fixture::new();
        let old = f.create(HOUR, NOW);
        f.create(HOUR, NOW + 3600);
        assert_eq!(f.book.list(NOW).len(), 2);
        f.create(HOUR, NOW + 3600 + REMEMBER_EXPIRED_S);
        assert!(f.book.list(NOW).iter().all(|entry| entry.id != old.id));
    }

    #[test]
    fn a_full_book_makes_room_by_what_is_void_only() {
        let mut f = Fixture::new();
        let record = |i: u64, revoked| Record {
            id: TicketId::from_bytes(i.to_le_bytes()),
            secret_hash: blake3::hash(b""),
            expires_unix_s: NOW + 100,
            revoked,
        };
        f.book.records = (0..MAX_TICKETS as u64).map(|i| record(i, i == 7)).collect();
        f.create(HOUR, NOW);
        f.reopen();
        assert_eq!(f.book.records.len(), MAX_TICKETS);
        let full = f.book.create(NodeId::from_bytes([1; 32]), Vec::new(), HOUR, NOW);
        assert!(matches!(full, Err(TicketBookError::Full)));
        assert_eq!(f.book.records.len(), MAX_TICKETS);
    }

    #[test]
    fn a_damaged_book_is_named_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let bad_id = r#"{"tickets":[{"id":"xx","secret_blake3":"","expires_unix_s":1,"revoked":false}]}"#;
        for text in ["", "{}", bad_id] {
            fs::write(&path, text).unwrap();
            assert!(matches!(TicketBook::open(dir.path()), Err(StoreError::Damaged { .. })), "{text}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }
}
