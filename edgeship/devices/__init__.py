"""Where a benchmark runs: this host, or an estimate for a device."""
