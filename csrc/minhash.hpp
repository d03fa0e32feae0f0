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

#include <algorithm>
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
    characters_.resize(shingle + kCharactersAtOnce);
  }

  // Fills out[0..places-1].
  void sign(std::string_view text, std::uint32_t* out) {
    taken_.assign(places_, kOpen);
    text = without_end_space(text);
    const Round first(*this, 0);
    bool any = false;
    each_shingle(text, [&any, first](std::uint64_t shingle) {
      any = true;
      first.put(shingle);
    });
    const auto open = static_cast<std::size_t>(std::count(taken_.begin(), taken_.end(), kOpen));
    if (any && open) fill_open(text, open);
    for (std::size_t k = 0; k < places_; ++k) out[k] = static_cast<std::uint32_t>(taken_[k]);
  }

 private:
  static constexpr std::uint64_t kOpen = ~std::uint64_t{0};
  static constexpr std::size_t kCharactersAtOnce = 4096;
  static constexpr std::uint64_t kEach = 0x0101010101010101u;

  // One round over shingles. A copy of what it needs, so that the compiler may hold it in registers.
  class Round {
   public:
    Round(MinHasher& hasher, std::uint64_t number)
        : taken_(hasher.taken_.data()), places_(hasher.places_), key_(hasher.keys_[number]), number_(number << 32) {}

    // The value of a shingle in the lower half, its place from the upper.
    std::uint64_t hash(std::uint64_t shingle) const {
      std::uint64_t hash = (shingle + key_) * 0x9fb21c651e98df25u;
      hash = (hash ^ hash >> 32) * 0xd6e8feb86659fd93u;
      return hash ^ hash >> 32;
    }

    // Offers a shingle to its place; whether the place was open. A value counts after the round it is of.
    bool put(std::uint64_t shingle) const {
      const std::uint64_t hashed = hash(shingle);
      std::uint64_t& place = taken_[(hashed >> 32) * places_ >> 32];
      const std::uint64_t before = place;
      place = std::min(before, number_ | (hashed & 0xFFFFFFFF));
      return before == kOpen;
    }

   private:
    std::uint64_t* taken_;
    std::uint64_t places_, key_, number_;
  };

  // The rounds after the first, over distinct shingles: a text that repeats itself costs no more than a short one.
  void fill_open(std::string_view text, std::size_t open) {
    collect(text);
    for (std::uint64_t number = 1; open && number < places_; ++number) {
      const Round round(*this, number);
      for (const std::uint64_t shingle : distinct_) open -= round.put(shingle);
    }
    for (std::size_t k = 0; open && k < places_; ++k) {
      if (taken_[k] != kOpen) continue;
      const Round round(*this, places_ + k);
      for (const std::uint64_t shingle : distinct_) taken_[k] = std::min(taken_[k], round.hash(shingle) & 0xFFFFFFFF);
    }
  }

  // Calls take(hash of 64 bits) for every shingle: a polynomial in the characters, rolled along the text.
  template <typename Take>
  void each_shingle(std::string_view text, Take take) {
    const std::uint64_t base = base_, leave = leave_;
    const std::size_t size = shingle_;
    std::uint32_t* const leaving = characters_.data();  // `size` characters behind `entering`, zeros at first
    std::uint32_t* const entering = leaving + size;
    std::fill(leaving, entering, 0);
    std::uint64_t rolled = 0;
    std::size_t seen = 0;
    bool after_space = true;
    const char* at = text.data();
    const char* const end = at + text.size();
    while (at < end) {
      const std::size_t count = next_characters(at, end, after_space, entering);
      std::size_t k = 0;
      for (; k < count && seen + k + 1 < size; ++k) rolled = rolled * base + entering[k];
      for (; k < count; ++k) {
        rolled = rolled * base + (entering[k] - leave * leaving[k]);
        take(rolled);
      }
      std::memmove(leaving, leaving + count, size * sizeof(*leaving));  // `count` may be 0
      seen += count;
    }
    if (seen && seen < size) take(rolled);  // the whole text is one shingle
  }

  // Writes characters, each plus 1, a run of white space as one space; returns their number, at most
  // kCharactersAtOnce. Eight ASCII characters without a run at once: no processor foresees where words end.
  static std::size_t next_characters(const char*& at, const char* end, bool& after_space, std::uint32_t* out) {
    std::size_t count = 0;
    while (at < end && count <= kCharactersAtOnce - 8) {
      if (end - at >= 8) {
        const std::uint64_t bytes = utf8::load8(at);
        const std::uint64_t spaces = spaces_of(bytes);
        if (!((bytes & utf8::kHighBits) | (spaces & (spaces << 8 | std::uint64_t{after_space} << 7)))) {
          const std::uint64_t whole = (spaces >> 7) * 0xFF;
          const std::uint64_t plain = ((bytes & ~whole) | (kEach * ' ' & whole)) + kEach;
          for (int k = 0; k < 8; ++k) out[count + k] = static_cast<std::uint32_t>(plain >> 8 * k & 0xFF);
          count += 8;
          at += 8;
          after_space = spaces >> 63;
          continue;
        }
      }
      do {
        const char32_t code = utf8::decode(at);
        const bool space = utf8::is_space(code);
        out[count] = (space ? U' ' : code) + 1;
        count += !(space && after_space);
        after_space = space;
      } while (at < end && count < kCharactersAtOnce && static_cast<unsigned char>(*at) >= 0x80);
    }
    return count;
  }

  // The highest bit of each byte that is ASCII white space (9 to 13, 28 to 32), where all eight are ASCII.
  static std::uint64_t spaces_of(std::uint64_t bytes) {
    const auto from = [bytes](unsigned low) { return bytes + kEach * (0x80 - low); };
    return ((from(9) & ~from(14)) | (from(28) & ~from(33))) & utf8::kHighBits;
  }

  void collect(std::string_view text) {
    distinct_.clear();
    free_bits_ = 64 - 10;
    while (free_bits_ > 64 - 13 && slots() < 2 * text.size()) --free_bits_;
    table_.assign(slots(), 0);
    each_shingle(text, [this](std::uint64_t shingle) {
      if (!insert(shingle)) return;
      distinct_.push_back(shingle);
      if (2 * distinct_.size() < slots()) return;
      --free_bits_;
      table_.assign(slots(), 0);
      for (const std::uint64_t known : distinct_) insert(known);
    });
  }

  std::size_t slots() const { return std::size_t{1} << (64 - free_bits_); }

  // Whether the shingle is new to the table, in which 0 is a free slot (a shingle of hash 0 counts as 1).
  bool insert(std::uint64_t shingle) {
    const std::uint64_t entry = shingle ? shingle : 1;
    std::uint64_t* const table = table_.data();
    std::size_t slot = static_cast<std::size_t>(entry * kGolden >> free_bits_);
    while (table[slot] && table[slot] != entry) slot = (slot + 1) & (table_.size() - 1);
    if (table[slot]) return false;
    table[slot] = entry;
    return true;
  }

  std::size_t places_, shingle_;
  int free_bits_ = 0;  // 64 less the bits of a slot's number
  std::uint64_t base_, leave_;
  std::vector<std::uint64_t> keys_;        // one a round
  std::vector<std::uint64_t> taken_;       // round and least value of each place, or kOpen
  std::vector<std::uint32_t> characters_;  // a stretch of the text, and `shingle` characters before it
  std::vector<std::uint64_t> distinct_;    // shingles of the document, in order of appearance
  std::vector<std::uint64_t> table_;       // the same, as a hash set
};

}  // namespace cpt
