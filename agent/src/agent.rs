//! Placeholder of the agent's loop: keeps the signature that `main` calls.

/// Runs the agent.
///
/// # Errors
/// A sentence for the console.
pub fn run(options: crate::init::roles::AgentOptions) -> Result<(), String> {
    Err(format!("not built yet: {options:?}"))
}
