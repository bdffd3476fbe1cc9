"""How the nets and data of the zoo were made."""
