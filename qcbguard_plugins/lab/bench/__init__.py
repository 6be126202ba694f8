"""The benchmark: attacks x formats x defenses x seeds from one file, resumed where it stopped."""
