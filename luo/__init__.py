"""Linux Live Update Orchestrator and Kexec HandOver, as a user-space engine."""
