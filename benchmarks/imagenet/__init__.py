"""Never run on ImageNet: the papers' tables at their budgets and settings, one command a table; see README.md here."""
