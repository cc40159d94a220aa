//! A session as the scheduler sees it, and the order in which sessions get slots.

use std::time::{Duration, Instant};

use brigade_base::{ImageId, SessionId, TenantId, Token};

use super::kv::{Kept, PrefixCache, Wanted, usable};

/// How long whoever gives no deadline is supposed to wait gladly. A session that has waited as long comes before all
/// newer ones, whatever their deadlines, so that nobody waits for ever.
const PATIENCE: Duration = Duration::from_secs(60);

/// A sequence that is to be continued.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// Names it.
    pub id: SessionId,
    /// At least one token.
    pub prompt: Vec<Token>,
    /// Tokens that were chosen already, elsewhere: the answer goes on behind them.
    pub answer: Vec<Token>,
    /// Whose it is.
    pub tenant: TenantId,
    /// Lower is earlier; it may take the slot of one with a higher number.
    pub priority: i32,
    /// When it came.
    pub at: Instant,
    /// When it is of no use any more.
    pub deadline: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct Session {
    pub(super) id: SessionId,
    pub(super) tenant: TenantId,
    pub(super) priority: i32,
    pub(super) deadline: Option<Instant>,
    /// When it should have begun, for the order of those who wait.
    pub(super) due: Instant,
    /// Counts arrivals.
    pub(super) arrived: u64,
    /// Prompt and answer so far.
    pub(super) tokens: Vec<Token>,
    /// Tokens of the prompt: these are computed in chunks, the others one by one.
    pub(super) n_prompt: u32,
    /// How many of the tokens have been sent through the ring, or were there already.
    pub(super) n_sent: u32,
    /// How many of these were computed in chunks, by whomever.
    pub(super) n_chunked: u32,
    /// The stages hold more tokens in its slot than those; they are cut when its first rows come.
    pub(super) has_surplus: bool,
    /// Passes in the ring with rows of it.
    pub(super) in_flight: u32,
    /// Rows were sent since it has its slot.
    pub(super) started: bool,
    /// The image that fills its slot, and how many tokens of it are for this session.
    pub(super) loading: Option<(ImageId, u32)>,
    /// Ended while something of it is in the ring: its slot is free when that is back.
    pub(super) ended: bool,
    /// To give up its slot as soon as nothing of it is in the ring.
    pub(super) leaving: bool,
}

impl Session {
    pub(super) fn new(arrival: Arrival, arrived: u64) -> Self {
        Self {
            id: arrival.id,
            tenant: arrival.tenant,
            priority: arrival.priority,
            deadline: arrival.deadline,
            due: arrival.deadline.map_or(arrival.at + PATIENCE, |deadline| deadline.min(arrival.at + PATIENCE)),
            arrived,
            n_prompt: arrival.prompt.len() as u32,
            tokens: [arrival.prompt, arrival.answer].concat(),
            n_sent: 0,
            n_chunked: 0,
            has_surplus: false,
            in_flight: 0,
            started: false,
            loading: None,
            ended: false,
            leaving: false,
        }
    }

    pub(super) fn n_unsent(&self) -> u32 {
        self.tokens.len() as u32 - self.n_sent
    }

    /// Whether it may send rows.
    fn is_active(&self) -> bool {
        !self.ended && !self.leaving && self.loading.is_none()
    }

    /// Whether part of its prompt is to be sent.
    pub(super) fn has_prompt_left(&self) -> bool {
        self.is_active() && self.n_sent < self.n_prompt
    }

    /// Whether it sends tokens one by one.
    pub(super) fn is_decoding(&self) -> bool {
        self.is_active() && self.n_sent >= self.n_prompt
    }

    /// Whether anything of it is in the ring.
    pub(super) fn is_away(&self) -> bool {
        self.in_flight > 0 || self.loading.is_some()
    }

    pub(super) fn wanted(&self) -> Wanted<'_> {
        Wanted { id: self.id, tenant: self.tenant, tokens: &self.tokens, n_prompt: self.n_prompt }
    }

    /// Rows of its next chunk under a budget: never one alone, which would be computed in another way.
    pub(super) fn chunk(&self, budget: u32) -> u32 {
        let left = self.n_prompt.saturating_sub(self.n_sent);
        let n = left.min(budget);
        match left - n {
            1 if n > 2 => n - 1,
            1 => n + 1,
            _ => n,
        }
    }

    /// Takes over the first `n_tokens` tokens that its slot holds now, if `has_surplus` of more.
    pub(super) fn take_over(&mut self, n_tokens: u32, n_chunked: u32, has_surplus: bool) {
        self.n_sent = n_tokens;
        self.n_chunked = n_chunked.min(n_tokens);
        self.has_surplus = has_surplus;
    }

    /// Its ring is lost with everything in it; its slot still holds the first `n_valid` of its tokens, if it has so
    /// many, and perhaps others behind them.
    pub(super) fn lose_all_but(&mut self, n_valid: u32) {
        // One token at least is computed again, for the logits; and of a prompt two.
        let n_valid =
            if self.loading.take().is_some() { 0 } else { n_valid.min(self.n_sent).min(self.tokens.len() as u32 - 1) };
        let n_valid = if n_valid + 1 == self.n_prompt { n_valid.saturating_sub(1) } else { n_valid };
        self.take_over(n_valid, self.n_chunked, true);
        (self.in_flight, self.started) = (0, false);
    }

    /// The same of a slot that cannot be cut back: it goes on if all stages hold just what was sent, so that no row is
    /// on its way and none must be computed again.
    pub(super) fn lose_unless_whole(&mut self, n_valid: u32) {
        let n_sent = self.n_sent;
        self.lose_all_but(n_valid);
        let is_whole = n_valid == n_sent && self.n_sent == n_sent;
        self.take_over(if is_whole { n_sent } else { 0 }, self.n_chunked, !is_whole);
    }

    /// How many of its first `n_there` tokens, of which `n_chunked` were computed in chunks, another session may take
    /// over.
    pub(super) fn usable(&self, n_there: u32, n_chunked: u32, wanted: Wanted<'_>, cache: PrefixCache) -> u32 {
        usable(&self.tokens[..n_there as usize], n_chunked, self.tenant, self.id, wanted, cache)
    }

    /// What its slot holds, once nothing of it is in the ring.
    pub(super) fn kept(&self, used: u64) -> Kept {
        Kept {
            tokens: self.tokens[..self.n_sent as usize].to_vec(),
            n_chunked: self.n_chunked,
            has_surplus: self.has_surplus,
            tenant: self.tenant,
            owner: self.id,
            used,
        }
    }
}

/// Tenants whose last turn is remembered: more than share a coordinator. Beyond them the longest ago is forgotten,
/// which is as if it had never had a turn.
const MAX_SERVED: usize = 1024;

/// When each tenant got a slot last.
#[derive(Debug, Default)]
pub(super) struct Served(Vec<(TenantId, u64)>);

impl Served {
    /// The time of its last turn; 0 before the first.
    pub(super) fn when(&self, tenant: TenantId) -> u64 {
        self.0.iter().find(|(other, _)| *other == tenant).map_or(0, |(_, at)| *at)
    }

    /// Takes in that a tenant gets a slot. Times rise.
    pub(super) fn note(&mut self, tenant: TenantId, at: u64) {
        self.0.retain(|(other, _)| *other != tenant);
        if self.0.len() == MAX_SERVED {
            self.0.remove(0);
        }
        self.0.push((tenant, at));
    }
}

/// Which of the waiting sessions is next: by priority; then of the tenant that has fewest sessions running, and of
/// those the one that got a slot longest ago (`served` tells when), so that nobody is shut out by another one's
/// hundred requests; then by deadline or patience, and by arrival.
pub(super) fn next_waiting(
    waiting: &[Session],
    running: impl Iterator<Item = TenantId>,
    served: impl Fn(TenantId) -> u64,
) -> Option<usize> {
    if waiting.len() < 2 {
        return (!waiting.is_empty()).then_some(0);
    }
    let mut counts: Vec<(TenantId, u32)> = Vec::new();
    for tenant in running {
        match counts.iter_mut().find(|(other, _)| *other == tenant) {
            Some((_, n)) => *n += 1,
            None => counts.push((tenant, 1)),
        }
    }
    let n_running = |tenant| counts.iter().find(|(other, _)| *other == tenant).map_or(0, |(_, n)| *n);
    let order = |session: &Session| {
        (session.priority, n_running(session.tenant), served(session.tenant), session.due, session.arrived)
    };
    waiting.iter().enumerate().min_by_key(|(_, session)| order(session)).map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When all of it happens.
    fn noon() -> Instant {
        static NOON: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        *NOON.get_or_init(Instant::now)
    }

    fn session(arrived: u64, tenant: u64, priority: i32, deadline: Option<Instant>) -> Session {
        let (id, tenant, at) = (SessionId(arrived), TenantId(tenant), noon() + Duration::from_secs(arrived));
        Session::new(Arrival { id, prompt: vec![1; 10], answer: vec![], tenant, priority, at, deadline }, arrived)
    }

    #[test]
    fn priority_comes_first_then_fairness_then_haste_then_arrival() {
        let now = noon();
        let later = now + Duration::from_secs(1);
        let order = |waiting: &[Session], running: &[u64]| {
            next_waiting(waiting, running.iter().map(|&t| TenantId(t)), |tenant| tenant.0).map(|at| waiting[at].arrived)
        };
        assert_eq!(order(&[], &[]), None);
        assert_eq!(order(&[session(1, 0, 0, None), session(2, 0, -1, None)], &[]), Some(2));
        assert_eq!(order(&[session(1, 7, 0, None), session(2, 8, 0, None)], &[7, 7, 8]), Some(2));
        assert_eq!(order(&[session(1, 8, 0, None), session(2, 7, 0, None)], &[]), Some(2), "served longer ago");
        assert_eq!(order(&[session(1, 0, 0, None), session(2, 0, 0, Some(later))], &[]), Some(2));
        assert_eq!(order(&[session(1, 0, 0, Some(later)), session(2, 0, 0, Some(now))], &[]), Some(2));
        assert_eq!(order(&[session(2, 0, 0, None), session(1, 0, 0, None)], &[]), Some(1));
        let hasty = |arrived| session(arrived, 0, 0, Some(noon() + Duration::from_secs(arrived + 5)));
        assert_eq!(order(&[session(1, 0, 0, None), hasty(50)], &[]), Some(50));
        assert_eq!(order(&[session(1, 0, 0, None), hasty(60)], &[]), Some(1), "it has waited for a minute");
    }

    #[test]
    fn turns_are_remembered_of_so_many_tenants() {
        let mut served = Served::default();
        (1..=MAX_SERVED as u64 + 1).for_each(|n| served.note(TenantId(n), n));
        served.note(TenantId(5), 9999);
        assert_eq!([1, 2, 5, 6].map(|n| served.when(TenantId(n))), [0, 2, 9999, 6]);
        assert_eq!(served.0.len(), MAX_SERVED);
    }

    #[test]
    fn no_chunk_leaves_or_is_a_single_row() {
        for n_prompt in 2..40 {
            for budget in 2..20 {
                let mut session = session(1, 0, 0, None);
                session.tokens = vec![0; n_prompt];
                session.n_prompt = n_prompt as u32;
                while session.has_prompt_left() {
                    let n = session.chunk(budget);
                    assert!(n >= 2 && n <= budget + 1, "{n} rows of {n_prompt}, budget {budget}");
                    session.n_sent += n;
                }
                assert_eq!(session.n_sent, n_prompt as u32);
            }
        }
    }
}
