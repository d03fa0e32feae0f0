// Signatures of documents: 128-bit fingerprints of the exact text, MinHash over character shingles.
//
// MinHash is the "fast similarity sketch" of Dahlgaard, Knudsen and Thorup (FOCS 2017). A round hashes every
// shingle once, to a place of the signature and a value; each place keeps its least value, and places that
// are taken when a round ends are never changed by a later one. Rounds 0..places-1 choose the place by the
// hash, rounds places..2*places-1 take the places one by one, so none stays open. The value at a place is
// that of a uniformly chosen shingle of the set, as with one full permutation a place, so equal places are
// an unbiased estimate of the Jaccard index with at most MinHash's variance; but one round does for a
// document of some thousand characters, where full permutations cost `places` hashes a shingle.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "order.hpp"
#include "utf8.hpp"

namespace cpt {

struct Fingerprint {
  std::uint64_t low, high;
};

// Two chains of 64 bits over 8-byte words; every step of each is a bijection of the state and of the word.
inline Fingerprint fingerprint(std::string_view bytes) {
  std::uint64_t low = derive(1, bytes.size());
  std::uint64_t high = derive(2, bytes.size());
  const auto take = [&low, &high](std::uint64_t word) {
    low = (low ^ word) * 0x9fb21c651e98df25u;
    low ^= low >> 32;
    high = ((high << 23 | high >> 41) + word) * 0xd6e8feb86659fd93u;
    high ^= high >> 29;
  };
  const char* at = bytes.data();
  std::size_t left = bytes.size();
  for (; left >= 8; left -= 8, at += 8) take(utf8::load8(at));
  std::uint64_t last = 0;  // padded with zeros: the length tells them from zeros of the text
  if (left) std::memcpy(&last, at, left);
  take(last);
  return {mix(low), mix(high + low)};
}

// The text without white space at its end.
inline std::string_view without_end_space(std::string_view text) {
  while (!text.empty()) {
    std::size_t start = text.size() - 1;
    while (start > 0 && (static_cast<unsigned char>(text[start]) & 0xC0) == 0x80) --start;
    const char* at = text.data() + start;
    if (!utf8::is_space(utf8::decode(at))) break;
    text = text.substr(0, start);
  }
  return text;
}

// The MinHash of documents. Shingles are `shingle` characters (code points) of the text in which each run of
// white space is one space, none at the ends; a shorter text is a single shingle. Letters keep their case.
class MinHasher {
 public:
  static constexpr std::uint32_t kEmpty = 0xFFFFFFFF;  // every place of a document without characters

  MinHasher(std::size_t places, std::size_t shingle, std::uint64_t seed)
      : places_(places), shingle_(shingle), base_(derive(seed, 0) | 1), leave_(1) {
    for (std::size_t k = 0; k < shingle; ++k) leave_ *= base_;
    for (std::size_t round = 0; round < 2 * places; ++round) keys_.push_back(derive(seed, round + 1));
    taken_.resize(places);
    ring_.resize(shingle);
  }

  // Fills out[0..places-1].
  void sign(std::string_view text, std::uint32_t* out) {
    taken_.assign(places_, kOpen);
    text = without_end_space(text);
    bool any = false;
    each_shingle(text, [&](std::uint64_t shingle) {
      any = true;
      put(shingle, 0);
    });
    std::size_t open = 0;
    for (const std::uint64_t place : taken_) open += place == kOpen;
    if (any && open) fill_open(text, open);
    for (std::size_t k = 0; k < places_; ++k) out[k] = static_cast<std::uint32_t>(taken_[k]);
  }

 private:
  static constexpr std::uint64_t kOpen = ~std::uint64_t{0};

  // Offers a shingle to its place of this round; whether the place was open. Values are compared below their round.
  bool put(std::uint64_t shingle, std::uint64_t round) {
    const std::uint64_t hash = hash_of(shingle, round);
    std::uint64_t& place = taken_[(hash >> 32) * places_ >> 32];
    const std::uint64_t value = round << 32 | (hash & 0xFFFFFFFF);
    const bool was_open = place == kOpen;
    if (value < place) place = value;
    return was_open;
  }

  std::uint64_t hash_of(std::uint64_t shingle, std::uint64_t round) const {
    std::uint64_t hash = (shingle + keys_[round]) * 0x9fb21c651e98df25u;
    hash = (hash ^ hash >> 32) * 0xd6e8feb86659fd93u;
    return hash ^ hash >> 32;
  }

  // The rounds after the first, over distinct shingles: a text that repeats itself costs no more than a short one.
  void fill_open(std::string_view text, std::size_t open) {
    collect(text);
    for (std::uint64_t round = 1; open && round < places_; ++round) {
      for (const std::uint64_t shingle : distinct_) open -= put(shingle, round);
    }
    for (std::size_t k = 0; open && k < places_; ++k) {
      if (taken_[k] != kOpen) continue;
      for (const std::uint64_t shingle : distinct_) {
        const std::uint64_t value = hash_of(shingle, places_ + k) & 0xFFFFFFFF;
        if (value < taken_[k]) taken_[k] = value;
      }
    }
  }

  // Calls take(hash of 64 bits) for every shingle: a polynomial in the characters, rolled along the text.
  template <typename Take>
  void each_shingle(std::string_view text, Take take) {
    std::uint64_t rolled = 0;
    std::size_t seen = 0, oldest = 0;
    bool after_space = true;
    ring_.assign(shingle_, 0);
    const char* at = text.data();
    const char* const end = at + text.size();
    while (at < end) {
      char32_t code = utf8::decode(at);
      const bool space = utf8::is_space(code);
      if (space && after_space) continue;
      after_space = space;
      if (space) code = ' ';
      rolled = rolled * base_ + (code + 1 - leave_ * ring_[oldest]);
      ring_[oldest] = code + 1;
      oldest = oldest + 1 == shingle_ ? 0 : oldest + 1;
      if (++seen >= shingle_) take(rolled);
    }
    if (seen && seen < shingle_) take(rolled);
  }

  void collect(std::string_view text) {
    distinct_.clear();
    std::size_t slots = 1024;
    table_.assign(slots, 0);
    each_shingle(text, [&](std::uint64_t shingle) {
      if (!insert(shingle)) return;
      distinct_.push_back(shingle);
      if (2 * distinct_.size() < slots) return;
      table_.assign(slots *= 2, 0);
      for (const std::uint64_t known : distinct_) insert(known);
    });
  }

  // Whether the shingle is new to the table, in which 0 is a free slot (a shingle of hash 0 counts as 1).
  bool insert(std::uint64_t shingle) {
    const std::uint64_t entry = shingle ? shingle : 1;
    const std::size_t mask = table_.size() - 1;
    std::size_t slot = static_cast<std::size_t>(mix(entry)) & mask;
    while (table_[slot] && table_[slot] != entry) slot = (slot + 1) & mask;
    if (table_[slot]) return false;
    table_[slot] = entry;
    return true;
  }

  std::size_t places_, shingle_;
  std::uint64_t base_, leave_;
  std::vector<std::uint64_t> keys_;      // one a round
  std::vector<std::uint64_t> taken_;     // round and least value of each place, or kOpen
  std::vector<std::uint64_t> ring_;      // the last `shingle` characters
  std::vector<std::uint64_t> distinct_;  // shingles of the document, in order of appearance
  std::vector<std::uint64_t> table_;     // the same, as a hash set
};

}  // namespace cpt
