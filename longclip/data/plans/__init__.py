"""Which sample comes when: arithmetic on positions."""
