//! The command line. Each long flag is also an environment variable `BRIGADE_…` and a key of `config.toml`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use brigade_base::{ByteSize, KvType, KvTypes};
use brigade_node::certify::{Cuts, MAX_TOKENS, MIN_TOKENS};
use brigade_node::{AdapterFile, DirectFetch, PoolingChoice, PrefixCache};
use brigade_plan::Optimize;
use brigade_plan::catalogue::models::Quant;
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{ArgAction, Args, Parser, Subcommand};

use crate::models::ModelsArgs;
use crate::pull::PullArgs;
use crate::sources::SourceArgs;
use crate::values::{
    NamedNode, adapter, direct_fetch, listen_address, may_fetch, named_node, node_name, optimize, prefix_cache, price,
    request_timeout, temperature, throttle, ticket_ttl, wait,
};

/// Pools the machines you own and serves one language model that none of them can hold.
#[derive(Debug, Parser)]
#[command(name = "brigade", version, max_term_width = 110, disable_help_subcommand = true)]
pub struct Cli {
    /// Say more on standard error; twice for details
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// Read settings from this file [default: config.toml in the state directory]
    #[arg(long, global = true, value_name = "FILE", env = "BRIGADE_CONFIG", value_parser = OsStringValueParser::new().map(PathBuf::from))]
    pub config: Option<PathBuf>,
    /// What to do
    #[command(subcommand)]
    pub verb: Verb,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Serve a model: print the join command and the endpoint's URL
    Serve(ServeArgs),
    /// Give this machine's memory and cores to a coordinator
    Join(JoinArgs),
    /// Ask the worker that runs here to hand its layers over and end
    Leave(LeaveArgs),
    /// Ask the model something; without a prompt, talk to it line by line
    Chat(ChatArgs),
    /// Show nodes, their stages and layers, memory and speed
    Status(StatusArgs),
    /// Fetch a model from the hub or the web, or go on with that
    Pull(PullArgs),
    /// List models that were fetched, or remove some
    Models(ModelsArgs),
    /// Show what is in a model file: architecture, quantisation, layers, cut points
    Inspect(InspectArgs),
    /// Run a model whole and cut into stages, and say whether the results are the same
    Certify(CertifyArgs),
    /// Say how a model would be placed on machines, before running it
    Plan(PlanArgs),
    /// Measure what this machine can do, or how fast it computes a model
    Profile(ProfileArgs),
    /// Make, list or revoke tickets of the coordinator that runs here
    Ticket(TicketArgs),
    /// Check all nodes of the cluster and their links, or this machine alone, and say what to fix
    Doctor(DoctorArgs),
    /// Measure an OpenAI-compatible endpoint, this one's or any other
    Bench(BenchArgs),
}

/// Where a node keeps what it must remember.
#[derive(Debug, Clone, Args)]
pub struct StateArgs {
    /// Keys, membership and cache; several nodes on one machine differ by it [default: ~/.local/state/brigade]
    #[arg(long, value_name = "DIR", env = "BRIGADE_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
}

/// What a node is and gives.
#[derive(Debug, Clone, Args)]
pub struct NodeArgs {
    #[command(flatten)]
    pub state: StateArgs,
    /// Name of this node for people [default: the host name]
    #[arg(long, env = "BRIGADE_NAME", value_parser = node_name)]
    pub name: Option<String>,
    /// Where links from other nodes come in; port 0 picks one
    /// [default: all addresses, port 7411 for serve and any port for join]
    #[arg(long, value_name = "ADDR", env = "BRIGADE_LISTEN", value_parser = listen_address)]
    pub listen: Option<SocketAddr>,
    /// Threads that compute [default: one per physical core]
    #[arg(long, value_name = "N", env = "BRIGADE_THREADS", value_parser = clap::value_parser!(u32).range(1..=512))]
    pub threads: Option<u32>,
    /// Memory that this node gives, for example 8GiB [default: what is free now]
    #[arg(long, value_name = "SIZE", env = "BRIGADE_MEMORY")]
    pub memory: Option<ByteSize>,
    /// Compute for this share of the time and rest in between, for a machine that is to stay usable, and for tests
    #[arg(long, value_name = "SHARE", default_value_t = 1.0, env = "BRIGADE_THROTTLE", value_parser = throttle)]
    pub throttle: f32,
}

/// Where a node's HTTP endpoint listens, and whom it lets in.
#[derive(Debug, Clone, Args)]
pub struct HttpArgs {
    /// Address of the HTTP endpoint; anything but loopback needs an API key
    #[arg(long, value_name = "IP", default_value = "127.0.0.1", env = "BRIGADE_BIND")]
    pub bind: IpAddr,
    /// Key that clients must send as `Authorization: Bearer KEY`; may be given several times
    #[arg(long, value_name = "KEY", env = "BRIGADE_API_KEY", hide_env_values = true)]
    pub api_key: Vec<String>,
    /// File with one such key per line
    #[arg(long, value_name = "FILE", env = "BRIGADE_API_KEY_FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Name under which clients without a key may know this machine, such as tower.lan; may be given several times
    #[arg(long, value_name = "NAME", env = "BRIGADE_HOST_NAME", value_delimiter = ',')]
    pub host_name: Vec<String>,
}

/// How the KV cache is stored.
#[derive(Debug, Clone, Args)]
pub struct KvArgs {
    /// How keys of the KV cache are stored: f16, q8_0 (about half the memory) or q4_0 (about a quarter)
    #[arg(long, value_name = "TYPE", default_value_t = KvType::F16, env = "BRIGADE_CACHE_TYPE_K")]
    pub cache_type_k: KvType,
    /// The same for values; other types than f16 turn flash attention on
    #[arg(long, value_name = "TYPE", default_value_t = KvType::F16, env = "BRIGADE_CACHE_TYPE_V")]
    pub cache_type_v: KvType,
}

/// `brigade serve`
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The model: a GGUF file (of a split one, any part), hf:OWNER/REPOSITORY[:FILE.gguf or :QUANTISATION][@REVISION]
    /// or https://… [default: abacus, a tiny model inside this program]
    #[arg(value_name = "MODEL", env = "BRIGADE_MODEL")]
    pub model: Option<PathBuf>,
    #[command(flatten)]
    pub sources: SourceArgs,
    #[command(flatten)]
    pub node: NodeArgs,
    /// Port of the HTTP endpoint; 0 picks one and prints it
    #[arg(long, default_value_t = 8080, env = "BRIGADE_PORT")]
    pub port: u16,
    #[command(flatten)]
    pub http: HttpArgs,
    /// Tokens of one session, prompt and answer together [default: what the model was trained for, at most 4096]
    #[arg(long, value_name = "N", env = "BRIGADE_CONTEXT", value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    pub context: Option<u32>,
    /// Sessions at once
    #[arg(long, value_name = "N", default_value_t = 4, env = "BRIGADE_PARALLEL", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub parallel: u32,
    #[command(flatten)]
    pub kv: KvArgs,
    /// What becomes of a text: a vector by mean, cls (its first token) or last, a score by rank, or none (it is
    /// continued); model does what the model's metadata says
    #[arg(long, value_name = "POOLING", default_value_t = PoolingChoice::Model, env = "BRIGADE_POOLING")]
    pub pooling: PoolingChoice,
    /// A LoRA adapter for the model, a GGUF file, and how strong it is to be; may be given several times
    #[arg(long, value_name = "FILE[:SCALE]", env = "BRIGADE_LORA", value_parser = adapter)]
    pub lora: Vec<AdapterFile>,
    /// Place the model once N nodes are here, this one counted
    #[arg(long, value_name = "N", default_value_t = 1, env = "BRIGADE_NODES", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub nodes: u32,
    /// Use every node, even where fewer would do
    #[arg(long, env = "BRIGADE_SPREAD")]
    pub spread: bool,
    /// Pin the split: layers of each stage, workers in the order of joining and this node last
    #[arg(long, value_name = "A,B,C", value_delimiter = ',', env = "BRIGADE_LAYERS")]
    pub layers: Option<Vec<u32>>,
    /// What the placement is to be best at: latency (one stream), throughput (all sessions together), balanced, or
    /// memory (shares follow memory, nothing is measured)
    #[arg(long, value_name = "WHAT", default_value = "balanced", env = "BRIGADE_OPTIMIZE", value_parser = optimize)]
    pub optimize: Optimize,
    /// Which computed tokens later requests of the same key may use: full (all), exact (no bit changes), or off
    #[arg(long, value_name = "WHICH", default_value = "full", env = "BRIGADE_PREFIX_CACHE", value_parser = prefix_cache)]
    pub prefix_cache: PrefixCache,
    /// Let requests of all keys use each other's computed tokens; timing then tells what others asked
    #[arg(long, env = "BRIGADE_SHARE_PREFIX_CACHE")]
    pub share_prefix_cache: bool,
    /// Disk on this node for idle sessions whose memory others need; used as far as all nodes give some
    #[arg(long, value_name = "SIZE", default_value = "0B", env = "BRIGADE_KV_SPILL")]
    pub kv_spill: ByteSize,
    /// Whether workers may fetch weights from where the model came from: auto (where that is faster than from other
    /// nodes), off, or on (at once)
    #[arg(long, value_name = "WHEN", default_value = "auto", env = "BRIGADE_DIRECT_FETCH", value_parser = direct_fetch)]
    pub direct_fetch: DirectFetch,
    /// How many nodes hold each worker's layers: 1, or 2, where another worker stands by with the weights loaded
    #[arg(long, value_name = "N", default_value_t = 1, env = "BRIGADE_REDUNDANCY", value_parser = clap::value_parser!(u32).range(1..=2))]
    pub redundancy: u32,
    /// Let the nodes that stand by compute along, so that nothing is computed again after a loss; wants --redundancy 2
    #[arg(long, env = "BRIGADE_SHADOW")]
    pub shadow: bool,
    /// How long answers wait for machines when the model fits no more on those that are left
    #[arg(long, value_name = "TIME", default_value = "30s", env = "BRIGADE_WAIT_FOR_CAPACITY", value_parser = wait)]
    pub wait_for_capacity: Duration,
    /// How long running answers may go on once this process is asked to end
    #[arg(long, value_name = "TIME", default_value = "30s", env = "BRIGADE_DRAIN_TIMEOUT", value_parser = wait)]
    pub drain_timeout: Duration,
    /// How long the printed ticket admits nodes, for example 30m or 2h
    #[arg(long, value_name = "TIME", default_value = "1h", env = "BRIGADE_TICKET_TTL", value_parser = ticket_ttl)]
    pub ticket_ttl: Duration,
    /// Also write the ticket to this file (readable by you alone)
    #[arg(long, value_name = "FILE", env = "BRIGADE_TICKET_FILE")]
    pub ticket_file: Option<PathBuf>,
}

/// `brigade join`
#[derive(Debug, Args)]
pub struct JoinArgs {
    /// The ticket that `brigade serve` printed; a node that was admitted before needs none
    #[arg(value_name = "TICKET", env = "BRIGADE_TICKET", hide_env_values = true)]
    pub ticket: Option<String>,
    /// Read the ticket from this file; a ticket that is given as well wins
    #[arg(long, value_name = "FILE", env = "BRIGADE_TICKET_FILE")]
    pub ticket_file: Option<PathBuf>,
    #[command(flatten)]
    pub node: NodeArgs,
    /// This node's own copy of the model, so that no weights need to be fetched; hf:… and https://… are pulled first
    #[arg(long, value_name = "FILE", env = "BRIGADE_MODEL")]
    pub model: Option<PathBuf>,
    #[command(flatten)]
    pub sources: SourceArgs,
    /// The adapters of the deployment, as `brigade serve` has them, so that this node can take over with its --model
    #[arg(long, value_name = "FILE[:SCALE]", env = "BRIGADE_LORA", value_parser = adapter)]
    pub lora: Vec<AdapterFile>,
    /// Most bytes of fetched weights that are kept on disk
    #[arg(long, value_name = "SIZE", default_value = "100GiB", env = "BRIGADE_CACHE_SIZE")]
    pub cache_size: ByteSize,
    /// Whether this node may fetch weights from where the model came from, where the coordinator wants that: auto, off
    #[arg(long, value_name = "WHEN", default_value = "auto", env = "BRIGADE_DIRECT_FETCH", value_parser = may_fetch)]
    pub direct_fetch: DirectFetch,
    /// Disk for idle sessions whose memory others need; used as far as all nodes give some
    #[arg(long, value_name = "SIZE", default_value = "0B", env = "BRIGADE_KV_SPILL")]
    pub kv_spill: ByteSize,
    /// How long this node may take to hand its layers over once it is asked to end, and as long for its own clients
    #[arg(long, value_name = "TIME", default_value = "30s", env = "BRIGADE_DRAIN_TIMEOUT", value_parser = wait)]
    pub drain_timeout: Duration,
    /// Answer HTTP on this port too; 0 picks one and prints it [default: no endpoint]
    #[arg(long, env = "BRIGADE_PORT")]
    pub port: Option<u16>,
    /// How long requests of this endpoint wait for a coordinator when theirs is lost
    #[arg(long, value_name = "TIME", default_value = "30s", env = "BRIGADE_WAIT_FOR_CAPACITY", value_parser = wait)]
    pub wait_for_capacity: Duration,
    #[command(flatten)]
    pub http: HttpArgs,
}

/// `brigade leave`
#[derive(Debug, Args)]
pub struct LeaveArgs {
    #[command(flatten)]
    pub state: StateArgs,
    /// How long to wait for its end
    #[arg(long, value_name = "TIME", default_value = "60s", env = "BRIGADE_TIMEOUT", value_parser = wait)]
    pub timeout: Duration,
}

/// Which endpoint to talk to.
#[derive(Debug, Clone, Args)]
pub struct EndpointArgs {
    #[command(flatten)]
    pub state: StateArgs,
    /// Endpoint, for example http://127.0.0.1:8080 [default: the coordinator that runs here]
    #[arg(long, env = "BRIGADE_URL")]
    pub url: Option<String>,
    /// Key to send, if the endpoint wants one
    #[arg(long, value_name = "KEY", env = "BRIGADE_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
}

/// `brigade chat`
#[derive(Debug, Args)]
pub struct ChatArgs {
    /// What to ask
    pub prompt: Option<String>,
    #[command(flatten)]
    pub endpoint: EndpointArgs,
    /// What the model is told first
    #[arg(long, env = "BRIGADE_SYSTEM")]
    pub system: Option<String>,
    /// Randomness, 0 to 2; 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.0, env = "BRIGADE_TEMPERATURE", value_parser = temperature, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Most tokens of an answer
    #[arg(long, value_name = "N", env = "BRIGADE_MAX_TOKENS")]
    pub max_tokens: Option<u32>,
}

/// `brigade status`
#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    pub endpoint: EndpointArgs,
    /// Print JSON
    #[arg(long, env = "BRIGADE_JSON")]
    pub json: bool,
}

/// `brigade inspect`
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The model: a GGUF file, or hf:… or https://…, of which only the header is read
    pub model: PathBuf,
    #[command(flatten)]
    pub sources: SourceArgs,
    #[command(flatten)]
    pub state: StateArgs,
    /// Print JSON
    #[arg(long, env = "BRIGADE_JSON")]
    pub json: bool,
    /// List every tensor
    #[arg(long, env = "BRIGADE_TENSORS")]
    pub tensors: bool,
}

/// `brigade certify`
#[derive(Debug, Args)]
pub struct CertifyArgs {
    /// The model: a GGUF file, hf:… or https://…; a tokenizer is not needed
    pub model: PathBuf,
    #[command(flatten)]
    pub sources: SourceArgs,
    #[command(flatten)]
    pub state: StateArgs,
    /// Cuts to try: so many, evenly chosen, or all, so that each legal place is in a cut into 2, 3 and 4 stages
    #[arg(long, value_name = "N", default_value = "3", env = "BRIGADE_CUTS", value_parser = crate::certify::cuts)]
    pub cuts: Cuts,
    /// Tokens of each of the two sessions
    #[arg(long, value_name = "N", default_value_t = 48, env = "BRIGADE_CERTIFY_TOKENS", value_parser = clap::value_parser!(u32).range(MIN_TOKENS as i64..=MAX_TOKENS as i64))]
    pub tokens: u32,
    /// Draw the tokens from this number
    #[arg(long, value_name = "N", default_value_t = 1, env = "BRIGADE_SEED")]
    pub seed: u64,
    /// Threads that compute [default: one per physical core]
    #[arg(long, value_name = "N", env = "BRIGADE_THREADS", value_parser = clap::value_parser!(u32).range(1..=512))]
    pub threads: Option<u32>,
    #[command(flatten)]
    pub kv: KvArgs,
    /// A LoRA adapter that the model is to be examined with, and how strong; may be given several times
    #[arg(long, value_name = "FILE[:SCALE]", env = "BRIGADE_LORA", value_parser = adapter)]
    pub lora: Vec<AdapterFile>,
    /// Print JSON
    #[arg(long, env = "BRIGADE_JSON")]
    pub json: bool,
}

/// `brigade plan`
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// The model: a GGUF file, its address (https://… or hf:OWNER/REPOSITORY[:FILE.gguf or :QUANTISATION], of which
    /// only the header is read), or a name such as llama-3.3-70b
    pub model: PathBuf,
    #[command(flatten)]
    pub sources: SourceArgs,
    /// Quantisation of a model that is given by name, for example Q8_0 [default: Q4_K_M]
    #[arg(long, value_name = "NAME", env = "BRIGADE_QUANT")]
    pub quant: Option<Quant>,
    /// Plan for the machines that this file describes
    #[arg(long, value_name = "FILE", env = "BRIGADE_CLUSTER", conflicts_with = "nodes")]
    pub cluster: Option<PathBuf>,
    /// Plan for a machine with so much memory, for example tower=16GiB@rtx-3090; the last one is the coordinator
    /// [default: the cluster that runs here, else this machine]
    #[arg(long = "node", value_name = "NAME=SIZE[@DEVICE]", value_parser = named_node, env = "BRIGADE_NODE", value_delimiter = ',')]
    pub nodes: Vec<NamedNode>,
    /// What links the machines that --node names, for example 2.5gbe
    #[arg(
        long,
        value_name = "NAME",
        default_value = "1gbe",
        env = "BRIGADE_LINK",
        requires = "nodes",
        conflicts_with = "cluster"
    )]
    pub link: String,
    /// What the plan is to be best at: latency, throughput, balanced (both) or memory (nothing is measured)
    #[arg(long, value_name = "WHAT", default_value = "balanced", env = "BRIGADE_OPTIMIZE", value_parser = optimize)]
    pub optimize: Optimize,
    /// Show what was rejected and why, and what other links, machines, files and contexts would bring
    #[arg(long, env = "BRIGADE_EXPLAIN")]
    pub explain: bool,
    /// Tokens of one session [default: what the model was trained for, at most 4096]
    #[arg(long, value_name = "N", env = "BRIGADE_CONTEXT", value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    pub context: Option<u32>,
    /// Sessions at once
    #[arg(long, value_name = "N", default_value_t = 4, env = "BRIGADE_PARALLEL", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub parallel: u32,
    #[command(flatten)]
    pub kv: KvArgs,
    /// What becomes of a text, as for `serve`: model, none, mean, cls, last or rank
    #[arg(long, value_name = "POOLING", default_value_t = PoolingChoice::Model, env = "BRIGADE_POOLING")]
    pub pooling: PoolingChoice,
    /// Use every node, even where fewer would do
    #[arg(long, env = "BRIGADE_SPREAD")]
    pub spread: bool,
    /// Pin the split: layers of each stage, the coordinator's last
    #[arg(long, value_name = "A,B,C", value_delimiter = ',', env = "BRIGADE_LAYERS")]
    pub layers: Option<Vec<u32>>,
    /// What a kilowatt-hour costs in US dollars, for the price of a token [default: as --cluster says, else 0.30]
    #[arg(long, value_name = "USD", env = "BRIGADE_PRICE_KWH", value_parser = price, allow_negative_numbers = true)]
    pub price_kwh: Option<f64>,
    /// What a million tokens of an answer cost elsewhere in US dollars, to compare with
    #[arg(long, value_name = "USD", env = "BRIGADE_CLOUD_PRICE", value_parser = price, allow_negative_numbers = true)]
    pub cloud_price: Option<f64>,
    #[command(flatten)]
    pub state: StateArgs,
    /// Print JSON
    #[arg(long, env = "BRIGADE_JSON")]
    pub json: bool,
}

/// `brigade profile`
#[derive(Debug, Args)]
pub struct ProfileArgs {
    /// The model, a GGUF file, hf:… or https://… [default: none, the machine itself is measured]
    pub model: Option<PathBuf>,
    #[command(flatten)]
    pub sources: SourceArgs,
    #[command(flatten)]
    pub state: StateArgs,
    /// Threads that compute [default: one per physical core]
    #[arg(long, value_name = "N", env = "BRIGADE_THREADS", value_parser = clap::value_parser!(u32).range(1..=512))]
    pub threads: Option<u32>,
    /// Share of the time for which this machine computes
    #[arg(long, value_name = "SHARE", default_value_t = 1.0, env = "BRIGADE_THROTTLE", value_parser = throttle)]
    pub throttle: f32,
    /// Tokens of one session [default: what the model was trained for, at most 4096]
    #[arg(long, value_name = "N", env = "BRIGADE_CONTEXT", value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    pub context: Option<u32>,
    /// Sessions at once
    #[arg(long, value_name = "N", default_value_t = 4, env = "BRIGADE_PARALLEL", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub parallel: u32,
    #[command(flatten)]
    pub kv: KvArgs,
    /// What becomes of a text, as for `serve`: model, none, mean, cls, last or rank
    #[arg(long, value_name = "POOLING", default_value_t = PoolingChoice::Model, env = "BRIGADE_POOLING")]
    pub pooling: PoolingChoice,
    /// Measure anew, even where that was done before
    #[arg(long, env = "BRIGADE_AGAIN")]
    pub again: bool,
    /// Print JSON
    #[arg(long, env = "BRIGADE_JSON")]
    pub json: bool,
}

/// `brigade ticket`
#[derive(Debug, Args)]
pub struct TicketArgs {
    /// State directory of the coordinator [default: ~/.local/state/brigade]
    #[arg(long, global = true, value_name = "DIR", env = "BRIGADE_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// How long a ticket that is made admits nodes, for example 30m or 2h
    #[arg(long, global = true, value_name = "TIME", default_value = "1h", env = "BRIGADE_TICKET_TTL", value_parser = ticket_ttl)]
    pub ticket_ttl: Duration,
    /// What to do with tickets [default: create]
    #[command(subcommand)]
    pub action: Option<TicketAction>,
}

/// What to do with tickets.
#[derive(Debug, Subcommand)]
pub enum TicketAction {
    /// Make one and print it
    Create,
    /// Show the valid ones, without their secrets
    List,
    /// Make one void; nodes that it admitted stay members
    Revoke {
        /// Its id, as `list` shows it
        id: String,
    },
}

/// `brigade doctor`
#[derive(Debug, Args)]
pub struct DoctorArgs {
    #[command(flatten)]
    pub endpoint: EndpointArgs,
    /// Show what is well, too
    #[arg(long, env = "BRIGADE_ALL")]
    pub all: bool,
    /// Print JSON
    #[arg(long, env = "BRIGADE_JSON")]
    pub json: bool,
}

/// `brigade bench`
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Endpoint to measure, for example http://127.0.0.1:8080; wins over --url
    /// [default: the coordinator that runs here]
    #[arg(value_name = "URL")]
    pub target: Option<String>,
    #[command(flatten)]
    pub endpoint: EndpointArgs,
    // Not BRIGADE_MODEL, which is a file where it is set for `brigade serve`.
    /// Model to ask [default: the first that the endpoint lists]
    #[arg(long, value_name = "NAME", env = "BRIGADE_BENCH_MODEL")]
    pub model: Option<String>,
    /// Tokens of a prompt
    #[arg(long, value_name = "N", default_value_t = 512, env = "BRIGADE_PROMPT_TOKENS", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub prompt_tokens: u32,
    /// Tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 256, env = "BRIGADE_TOKENS", value_parser = clap::value_parser!(u32).range(2..=65_536))]
    pub tokens: u32,
    /// Measured runs, after one to warm up
    #[arg(long, value_name = "N", default_value_t = 5, env = "BRIGADE_RUNS", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub runs: u32,
    /// Requests at once; each number is measured by itself
    #[arg(long, value_name = "A,B", default_value = "1,8", value_delimiter = ',', env = "BRIGADE_STREAMS", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub streams: Vec<u32>,
    /// Longest that one request may take, for example 90s or 10m
    #[arg(long, value_name = "TIME", default_value = "10m", env = "BRIGADE_TIMEOUT", value_parser = request_timeout)]
    pub timeout: Duration,
    /// Ask for chats; without it plain completions, and chats where the endpoint has none
    #[arg(long, env = "BRIGADE_CHAT")]
    pub chat: bool,
    /// Send the same prompt again and again, to measure the endpoint's prefix cache
    #[arg(long, env = "BRIGADE_SAME_PROMPT")]
    pub same_prompt: bool,
    /// Draw the prompts from this number
    /// [default: another one each time, so that no cache of the endpoint knows them]
    #[arg(long, value_name = "N", env = "BRIGADE_SEED")]
    pub seed: Option<u64>,
    /// Print JSON
    #[arg(long, env = "BRIGADE_JSON")]
    pub json: bool,
}

impl StateArgs {
    /// The state directory: as given, else where the system keeps a user's state.
    pub fn dir(&self) -> PathBuf {
        let from_env = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        self.state_dir
            .clone()
            .or_else(|| from_env("XDG_STATE_HOME").map(|dir| dir.join("brigade")))
            .or_else(|| from_env("HOME").map(|home| home.join(".local/state/brigade")))
            .unwrap_or_else(|| PathBuf::from(".brigade"))
    }
}

impl KvArgs {
    /// Both types.
    pub fn types(&self) -> KvTypes {
        KvTypes { k: self.cache_type_k, v: self.cache_type_v }
    }
}

impl NodeArgs {
    /// The node's name for people.
    pub fn name(&self) -> String {
        self.name.clone().unwrap_or_else(brigade_node::system::host_name)
    }

    /// Where links come in, with `port` unless told otherwise.
    pub fn listen(&self, port: u16) -> SocketAddr {
        self.listen.unwrap_or_else(|| {
            let has_ipv6 = std::net::UdpSocket::bind("[::1]:0").is_ok();
            let all: IpAddr = if has_ipv6 { [0u16; 8].into() } else { [0u8; 4].into() };
            SocketAddr::new(all, port)
        })
    }

    /// Threads that compute.
    pub fn threads(&self) -> u32 {
        self.threads.unwrap_or_else(brigade_node::system::default_threads)
    }

    /// Memory that the node gives.
    pub fn memory(&self) -> ByteSize {
        self.memory.unwrap_or_else(brigade_node::system::available_memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_is_an_environment_variable_and_has_help() {
        fn check(command: &clap::Command) {
            for arg in
                command.get_arguments().filter(|a| !["help", "version", "verbose"].contains(&a.get_id().as_str()))
            {
                assert!(arg.get_help().is_some(), "{} {} has no help", command.get_name(), arg.get_id());
                if arg.get_long().is_some() {
                    let env = arg.get_env().map(|env| env.to_string_lossy().into_owned()).unwrap_or_default();
                    assert!(env.starts_with("BRIGADE_"), "{} --{}", command.get_name(), arg.get_id());
                }
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }
}
