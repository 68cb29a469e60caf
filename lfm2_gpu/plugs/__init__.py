"""Room for adapters to other servers, each one small file."""
