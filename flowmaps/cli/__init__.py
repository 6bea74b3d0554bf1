"""Command lines over the library, one module per command: flags, build, call. Nothing else imports from here."""
