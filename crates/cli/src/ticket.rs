//! `brigade ticket`: tickets of the coordinator that runs here.

use std::time::Duration;

use serde_json::{Value, json};

use crate::args::{StateArgs, TicketAction, TicketArgs};
use crate::endpoint::{Endpoint, Note};
use crate::error::Failure;
use crate::output;

/// Makes, lists or revokes.
pub fn run(args: &TicketArgs) -> Result<(), Failure> {
    let note = Note::find(&StateArgs { state_dir: args.state_dir.clone() }.dir())?;
    let endpoint = Endpoint::at(&note.url, Some(note.admin_token))?;
    match &args.action {
        None | Some(TicketAction::Create) => create(&endpoint, args.ticket_ttl),
        Some(TicketAction::List) => {
            let reply = endpoint.get("/brigade/v1/tickets")?;
            let tickets = reply.get("data").unwrap_or(&reply).as_array().cloned().unwrap_or_default();
            if tickets.is_empty() {
                return output::line("no ticket is valid");
            }
            tickets.iter().try_for_each(|ticket| {
                let seconds = ticket.get("expires_in_s").and_then(Value::as_u64).unwrap_or(0);
                let left = humantime::format_duration(Duration::from_secs(seconds));
                output::line(format_args!("{}  {left} left", ticket.get("id").and_then(Value::as_str).unwrap_or("")))
            })
        }
        Some(TicketAction::Revoke { id }) => {
            if id.is_empty() || !id.chars().all(|c| c.is_ascii_alphanumeric()) {
                return Err(Failure::usage(format!("{id:?} is no ticket's id; `brigade ticket list` shows them")));
            }
            endpoint.delete(&format!("/brigade/v1/tickets/{id}"))?;
            output::line(format_args!("ticket {id} is void"))
        }
    }
}

fn create(endpoint: &Endpoint, ttl: Duration) -> Result<(), Failure> {
    let ticket = endpoint.post("/brigade/v1/tickets", &json!({"ttl_s": ttl.as_secs()}))?;
    let text = ticket.get("ticket").and_then(Value::as_str);
    output::line(text.ok_or_else(|| Failure::run("the coordinator sent no ticket"))?)
}
