"""From scores to a decision: the loop, the policies, the budget and what each phase reads."""
