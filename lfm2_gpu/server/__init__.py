"""Room for the HTTP server: it will take an engine as an argument and import no torch."""
