"""Plans: from what there is to how a spec is carried out."""
