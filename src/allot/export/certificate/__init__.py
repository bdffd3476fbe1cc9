"""What was promised and what the re-opened files hold."""
