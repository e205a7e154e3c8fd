"""What `experiments.report` puts onto its page: pictures, galleries, the words of other pages, and what opens it."""
