"""Policies that really do the tasks, and the table that says what each way of training keeps of them."""
